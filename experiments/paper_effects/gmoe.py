"""GMoE, table 1: sparse experts generalise to domains that training does not see."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(system='GMoE', claim='Digits of an unseen rotation are read better than by the dense model.',
                program='experiments.paper_effects.programs.rotated_digits', metric='unseen',
                variants={'dense': {}, 'cosine router': {}}, larger='cosine router',
                smaller='dense')
