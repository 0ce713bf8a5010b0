"""BASE: what the balanced assignment prevents."""
from experiments.paper_effects._load import heaviest_load
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='BASE layers',
    claim='Without the assignment, and without a loss, some experts get far more tokens than others.',
    program='experiments.paper_effects.programs.compared',
    variants={'balanced assignment': {}, 'best expert': {}},
    metric=heaviest_load, larger='best expert', smaller='balanced assignment', at_least=2.)
