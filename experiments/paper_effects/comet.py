"""COMET: which experts trees with a searched order find, and which top-k does, where experts are fixed."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='COMET',
    claim='Of two experts out of 16 that make up a task, COMET with its search finds both more often than a top-2.',
    program='experiments.paper_effects.programs.support',
    variants={'comet_plus': {}, 'comet': {}, 'top_k': {}},
    metric='recovered', larger='comet_plus', smaller='top_k')
