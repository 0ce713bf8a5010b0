"""Losses over both levels of a hierarchy (Sparsely-gated MoE, appendix B)."""
from experiments.paper_effects._load import load_variation
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Hierarchical MoE',
    claim='Without the importance and load losses, the load of the experts of all groups varies twice as much at least.',
    config='configs/hierarchical_chitchat.py',
    common={'model.dim': 64, 'model.moe.experts.hidden': 64, 'data.batch_size': 8, 'data.length': 64,
            'data.source.test_fraction': 0.002, 'training.steps': 200, 'training.log_every': 20},
    variants={'without losses': {'model.moe.router.balance.gate_importance': 0.0,
                                 'model.moe.router.balance.hierarchical_load.coefficient': 0.0},
              'both 0.1': {}},
    metric=load_variation, larger='without losses', smaller='both 0.1', at_least=2.)
