"""Hash Layers, section 5 and table 3: what is hashed decides."""
from experiments.paper_effects.effect import Effect

_VARIANTS = {name: {} for name in ('random', 'balanced', 'bigrams', 'previous', 'positions', 'future', 'clustered',
                                   'dispersed')}
_COMMON = dict(system='Hash layers', program='experiments.paper_effects.programs.hash_variants', metric='loss')

EFFECTS = dict(
    tables=Effect(claim='Hashing positions, which say nothing of the word, is worse than hashing words.',
                  variants={name: {} for name in _VARIANTS if name not in ('future',)}, larger='positions',
                  smaller='random', **_COMMON),
    oracle=Effect(claim='An oracle that hashes the next word is far below all that a model can use.',
                  variants={name: {} for name in ('random', 'future')}, larger='random', smaller='future', at_least=1.3,
                  **_COMMON))
