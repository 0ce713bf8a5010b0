"""What a sorted, grouped product saves (FastMoE, section 5): time against the number of experts."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='FastMoE',
    claim='From 4 to 64 experts, a loop over experts takes at least four times as much longer as sorted tokens do.',
    program='experiments.paper_effects.programs.expert_growth', variants={'reference': {}, 'grouped': {}},
    metric='growth', larger='reference', smaller='grouped', at_least=4.)
