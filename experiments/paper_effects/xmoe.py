"""X-MoE, section 5.3: cosine routing in few dimensions changes its mind less than dot products do."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(system='X-MoE', claim='With dot products, more bytes change their expert after a third of training.',
                program='experiments.paper_effects.programs.routing_stability', metric='fluctuation',
                variants={'dot': {}, 'cosine': {}}, larger='dot', smaller='cosine')
