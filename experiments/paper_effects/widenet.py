"""A shared mixture is better than a shared dense block, more so with norms of each layer (WideNet, table 5)."""
from experiments.paper_effects._tiny_images import TINY_IMAGES
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='WideNet',
    claim='Layers that share a mixture, all but norms, classify better than layers that share a dense block.',
    config='configs/widenet_digits.py',
    common=TINY_IMAGES,
    variants={'ALBERT': {'model.moe.num_experts': 1, 'model.moe.router.select.k': 1, 'model.moe.experts.hidden': 128,
                         'model.sharing': 'all'},  # two experts of 64 are one of 128
              'shared norms': {'model.sharing': 'all'},
              'WideNet': {}},
    metric='eval/test/accuracy', larger='WideNet', smaller='ALBERT')
