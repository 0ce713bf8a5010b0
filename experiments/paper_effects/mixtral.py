"""Neighbouring tokens go to the same expert (Mixtral, table 5)."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Mixtral',
    claim='A byte has the same first expert as the byte before it more often than any two bytes have.',
    program='experiments.paper_effects.programs.repetition', variants={'neighbours': {}, 'any two': {}},
    metric='same', larger='neighbours', smaller='any two')
