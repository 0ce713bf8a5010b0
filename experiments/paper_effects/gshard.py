"""The balance loss keeps tokens from being dropped (GShard, section 2.2)."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='GShard',
    claim='Without the balance loss, more choices find their expert full.',
    config='configs/gshard_chitchat.py',
    common={**TINY_TEXT, 'model.moe.router.place.capacity_factor': 1.},
    variants={'no loss': {'model.moe.router.balance.switch.coefficient': 0.},
              'loss 0.01': {'model.moe.router.balance.switch.coefficient': 0.01}},
    metric='router/block_01/dropped', larger='no loss', smaller='loss 0.01', at_least=1.2)
