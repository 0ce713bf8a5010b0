"""Batch Prioritized Routing at low capacity (V-MoE, figure 8)."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='V-MoE',
    claim='Evaluated with a quarter of the capacity, a model is more accurate with batch priority than without.',
    program='experiments.paper_effects.programs.vmoe_capacity',
    variants={'batch': {}, 'position': {}},
    metric='accuracy', larger='batch', smaller='position')
