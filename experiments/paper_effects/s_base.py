"""S-BASE: what the transport plan prevents."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='S-BASE',
    claim='With slots for twice an equal share, tokens are dropped where they choose by their logits, hardly any by the '
          'plan.',
    program='experiments.paper_effects.programs.compared',
    variants={'transport plan': {}, 'largest logit': {}},
    metric='router/block_00/dropped', larger='largest logit', smaller='transport plan')
