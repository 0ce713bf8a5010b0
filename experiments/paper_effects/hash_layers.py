"""Hash Layers, section 5 and table 3: what is hashed decides."""
from experiments.paper_effects.effect import Effect

COMMON = dict(system='Hash layers', program='experiments.paper_effects.programs.hash_variants', metric='loss')
EFFECT = Effect(
    claim='Hashing positions, which say nothing of the word, is worse than hashing words.',
    variants={'random': {}, 'positions': {}}, larger='positions', smaller='random', **COMMON)
EFFECTS = dict(oracle=Effect(
    claim='An oracle that hashes the next word is far below all that a model can use.',
    variants={'random': {}, 'future': {}}, larger='random', smaller='future', at_least=1.3, **COMMON))
