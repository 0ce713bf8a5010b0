"""Thresholds that are learned in training for evaluation (Sparsely-gated MoE, appendix F)."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Sparsely-gated MoE (strictly balanced)',
    claim='At evaluation, an expert takes a number of tokens nearer to an equal share where its threshold has learned.',
    program='experiments.paper_effects.programs.thresholds', variants={'loss 0': {}, 'loss 1': {}},
    metric='imbalance', larger='loss 0', smaller='loss 1')
