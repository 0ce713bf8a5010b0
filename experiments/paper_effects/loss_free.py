"""Biases that are stepped against the load (2408.15664), instead of a loss."""
from experiments.paper_effects._load import load_variation
from experiments.paper_effects._tiny_text import TINY_TEXT
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Loss-free balancing',
    claim='Without the steps of the biases, the load of the experts varies at least three times as much.',
    config='configs/loss_free_chitchat.py', common=TINY_TEXT,
    variants={'no steps': {'model.moe.router.balance.bias.rate': 0.}, 'steps of 0.001': {}},
    metric=load_variation, larger='no steps', smaller='steps of 0.001', at_least=3.)
