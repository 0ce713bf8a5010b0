"""Balance losses at both levels of MoE2D."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='MoE2D',
    claim='Without the balance losses of groups and of experts, more choices find their group or expert full.',
    config='configs/moe_2d_chitchat.py', common=TINY_TEXT,
    variants={'no loss': {'model.moe.router.balance.hierarchical_switch': 0.}, 'loss 0.01': {}},
    metric='router/block_01/dropped', larger='no loss', smaller='loss 0.01', at_least=1.2)
