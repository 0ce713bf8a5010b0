"""Sparsely-gated MoE: what the losses do to the load of the experts (section 4, table 6 of the paper)."""
from experiments.paper_effects._load import load_variation
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Sparsely-gated MoE',
    claim='Without the importance and load losses, the load of the experts varies at least five times as much.',
    config='configs/sparsely_gated_chitchat.py',
    common={'model.dim': 64, 'model.moe.num_experts': 8, 'model.moe.experts.hidden': 64, 'data.batch_size': 8,
            'data.length': 64, 'model.moe.router.select.k': 2, 'training.steps': 200, 'training.log_every': 20},
    variants={'without losses': {'model.moe.router.balance.gate_importance': 0.0,
                                 'model.moe.router.balance.smooth_load': 0.0},
              'both 0.1': {}},
    metric=load_variation, larger='without losses', smaller='both 0.1', at_least=5.)
