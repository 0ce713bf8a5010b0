"""A token that lost one of two experts gives the other all the weight (fairseq's default order)."""
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='fairseq MoE',
    claim='With few slots, evaluated with a quarter of what training has, the loss rises.',
    config='configs/fairseq_chitchat.py',
    common={**TINY_TEXT, 'model.positions.length': 64},
    variants={'as in training': {}, 'a tenth of the tokens': {'model.moe.router.place.eval_capacity_factor': 0.1}},
    metric='eval/test/loss', larger='a tenth of the tokens', smaller='as in training')
