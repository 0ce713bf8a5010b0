"""LIMoE: what becomes of the text without the entropy losses."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='LIMoE',
    claim='With entropy losses by modality, more of the text is computed than with the classic losses alone.',
    config='configs/limoe_digits.py',
    common={'training.steps': 200, 'data.batch_size': 32, 'model.dim': 32, 'model.feed_forward.hidden': 64,
            'model.moe.experts.hidden': 64, 'optimizer.schedule.warmup': 20},
    variants={'classic losses': {'model.moe.router.balance.local_entropy.coefficient': 0.0,
                                 'model.moe.router.balance.global_entropy.coefficient': 0.0},
              'entropy losses': {}},
    metric='router/block_01/text_success', larger='entropy losses', smaller='classic losses')
