"""StableMoE, figure 1 and section 4.4: greedy routing goes on changing, distilled routing does not."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(system='StableMoE',
                claim='With stage 1 alone, more bytes change their expert after a third of training.',
                program='experiments.paper_effects.programs.routing_stability', metric='fluctuation',
                variants={'greedy': {}, 'stable': {}}, larger='greedy', smaller='stable')
