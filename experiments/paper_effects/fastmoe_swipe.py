"""What the reassignment of the SWIPE gate prevents."""
from experiments.paper_effects._load import heaviest_load
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='FastMoE (SWIPE gate)',
    claim='Without the reassignment, and without a loss, some experts get far more tokens than others.',
    program='experiments.paper_effects.programs.compared',
    variants={'swipe': {}, 'two best experts': {}},
    metric=heaviest_load, larger='two best experts', smaller='swipe', at_least=1.5)
