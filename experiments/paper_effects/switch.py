"""More experts at the same compute learn faster (Switch Transformer, figure 1)."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

# What an expert more costs in slots is kept out: every variant has room for all tokens.
EFFECT = Effect(
    system='Switch Transformer',
    claim='At the same compute for each token, 16 experts reach a lower loss than one.',
    config='configs/switch_chitchat.py',
    common={**TINY_TEXT, 'model.moe.router.place.capacity_factor': 2., 'training.steps': 400, 'evaluation.every': 400,
            'checkpoint.every': 400},
    variants={f'{number} experts': {'model.moe.num_experts': number} for number in (1, 16)},
    metric='eval/test/loss', larger='1 experts', smaller='16 experts')
