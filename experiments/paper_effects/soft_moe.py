"""Soft MoE (2308.00951, figure 3) against tokens that choose, at the same compute."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Soft MoE', claim='Mixed slots classify better than two experts for each patch, at the same compute.',
    program='experiments.paper_effects.programs.compared',
    variants={'soft slots': {}, 'two experts a patch': {}},
    metric='eval/test/accuracy', larger='soft slots', smaller='two experts a patch')
