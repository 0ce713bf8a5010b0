"""RL-R (2202.01169, section 3.3): the reward teaches the router which experts predict well."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='RL-R', claim='Taught by the reward, the router becomes more certain than by the balance loss alone.',
    config='configs/rl_routing_chitchat.py:one',
    common={'training.steps': 150, 'model.dim': 48, 'model.moe.experts.hidden': 96, 'data.length': 64,
            'data.source.test_fraction': 0.004, 'evaluation.every': 150, 'checkpoint.every': 150},
    variants={'no reward': {'method.coefficient': 0.0}, 'reinforce': {'method.coefficient': 1.0}},
    metric='router/block_01/entropy', larger='no reward', smaller='reinforce')
