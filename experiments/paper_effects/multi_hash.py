"""MultiHash (Hash Layers, table 4): parts of a feed-forward by several hashes."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='MultiHash layers',
    claim='Two hashes, each of half a feed-forward, reach a lower loss than one of the whole.',
    program='experiments.paper_effects.programs.compared',
    variants={'one hash': {}, 'two hashes': {}},
    metric='eval/test/loss', larger='one hash', smaller='two hashes')
