"""Towards Understanding MoE: mixtures of nonlinear and of linear experts on data in clusters (table 1 of the paper)."""
from experiments.paper_effects.effect import Effect

COMMON = dict(system='Towards Understanding MoE', program='experiments.paper_effects.programs.clusters',
              variants={'nonlinear': {}, 'linear': {}})
EFFECT = Effect(
    claim='On data in clusters, cubic experts with a linear router are more accurate than linear ones, by 3% at least.',
    metric='test/accuracy', larger='nonlinear', smaller='linear', at_least=1.03, **COMMON)
EFFECTS = dict(entropy=Effect(
    claim='Linear experts leave at least twice the entropy about the cluster that cubic experts leave.',
    metric='test/dispatch_entropy', larger='linear', smaller='nonlinear', at_least=2., **COMMON))
