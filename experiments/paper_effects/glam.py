"""More experts at the same compute learn faster, with diminishing returns (GLaM, figure 3)."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='GLaM',
    claim='Two of 16 experts reach a lower loss than two of two, at the same compute for each token.',
    config='configs/glam_chitchat.py',
    common={**TINY_TEXT, 'model.moe.experts.hidden': 64, 'training.steps': 400, 'evaluation.every': 400,
            'checkpoint.every': 400},
    variants={f'{number} experts': {'model.moe.num_experts': number} for number in (2, 16)},
    metric='eval/test/loss', larger='2 experts', smaller='16 experts')
