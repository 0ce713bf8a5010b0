"""DSelect-k: which experts a differentiable gate finds, and which top-k does, where experts are fixed."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='DSelect-k',
    claim='Of two experts out of 16 that make up a task, DSelect-k finds both more often than a top-2 gate.',
    program='experiments.paper_effects.programs.support',
    variants={'dselect_k': {}, 'top_k': {}},
    metric='recovered', larger='dselect_k', smaller='top_k')
