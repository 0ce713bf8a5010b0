"""HASH of the unified scaling laws: what experts are worth where tokens are routed by their number alone."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='HASH',
    claim='At the same compute for each token, 16 experts reach a lower loss than one.',
    config='configs/hash_modulo_chitchat.py',
    common={**TINY_TEXT, 'training.steps': 400, 'evaluation.every': 400, 'checkpoint.every': 400},
    variants={f'{number} experts': {'model.moe.num_experts': number} for number in (1, 16)},
    metric='eval/test/loss', larger='1 experts', smaller='16 experts')
