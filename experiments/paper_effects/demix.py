"""DEMix (2108.05036, table 2): experts by domain are better language models than a dense one of the same compute."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='DEMix', claim='Told the domain, experts by domain have a lower perplexity than a dense model.',
    program='experiments.paper_effects.programs.domains', variants={'dense': {}, 'demix': {}},
    metric='eval/test/perplexity', larger='dense', smaller='demix')
