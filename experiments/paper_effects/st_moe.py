"""The router z-loss keeps router logits small (ST-MoE, section 3.3)."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='ST-MoE',
    claim="Without the router z-loss, the routers' log-partition functions grow larger.",
    config='configs/st_moe_chitchat.py',
    common={'model.dim': 64, 'data.length': 64, 'data.source.test_fraction': 0.002, 'training.steps': 200,
            'optimizer.schedule.peak': 1e-2, 'evaluation.every': 200, 'checkpoint.every': 200},
    variants={f'z-loss {size}': {f'model.{side}.moe.router.balance.z': size for side in ('encoder', 'decoder')}
              for size in (0., 1e-3)},
    metric='router/encoder_block_01/z_loss', larger='z-loss 0.0', smaller='z-loss 0.001', at_least=1.5)
