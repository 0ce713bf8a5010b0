"""Sparsity-constrained optimal transport: what the sums over experts do for tokens."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Sparsity-constrained OT',
    claim='Of the same number of slots, fewer tokens are left without any than by Expert Choice.',
    program='experiments.paper_effects.programs.compared',
    variants={'sparse transport': {}, 'expert choice': {}},
    metric='router/block_03/dropped', larger='expert choice', smaller='sparse transport')
