"""Smaller initial weights make early training steadier (Switch Transformer, table 3)."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Switch Transformer',
    claim='Early in training, experts that start at a tenth of the variance have a lower loss.',
    config='configs/switch_chitchat.py',
    common={**TINY_TEXT, 'training.steps': 50, 'evaluation.every': 50, 'checkpoint.every': 50,
            'model.moe.router.place.capacity_factor': 2.},
    variants={'scale 1': {'model.moe.experts.init_scale': 1.}, 'scale 0.1': {'model.moe.experts.init_scale': 0.1}},
    metric='eval/test/loss', larger='scale 1', smaller='scale 0.1')
