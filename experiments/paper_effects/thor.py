"""THOR (2110.04260, section 3): consistency makes the prediction independent of which experts are drawn."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='THOR', claim='With the consistency loss, the loss varies at most a third as much over draws of the experts.',
    program='experiments.paper_effects.programs.thor_draws', variants={'alpha 0': {}, 'alpha 5': {}},
    metric='spread', larger='alpha 0', smaller='alpha 5', at_least=3.0)
