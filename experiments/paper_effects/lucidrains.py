"""Further experts by chance (st-moe-pytorch, after GShard): what they save."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='st-moe-pytorch',
    claim='Where second and third experts are always taken, more choices find their expert full than where by chance.',
    config='configs/lucidrains_chitchat.py', common=TINY_TEXT,
    variants={policy: {'model.moe.router.select.policy': policy} for policy in ('all', 'random')},
    metric='router/block_01/dropped', larger='all', smaller='random')
