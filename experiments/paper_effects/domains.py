"""Experts that domains of text are routed to, against a dense model of the same active compute.

DEMix (2108.05036, table 2), task-aware gates (2204.07689), and routes learned for each task (2205.12701).
"""
from experiments.paper_effects.effect import Effect

PROGRAM = dict(program='experiments.paper_effects.programs.domains', metric='eval/test/perplexity', larger='dense')
EFFECTS = dict(
    demix=Effect(
        system='DEMix', claim='Told the domain, experts by domain have a lower perplexity than a dense model.',
        variants={'dense': {}, 'demix': {}}, smaller='demix', **PROGRAM),
    task_aware=Effect(
        system='Task-aware MoE', claim='Two experts by token and domain have a lower perplexity than a dense model.',
        variants={'dense': {}, 'task_aware': {}}, smaller='task_aware', **PROGRAM),
    cross_task=Effect(
        system='CrossTaskMoE',
        claim='Experts that each domain picks for itself have a lower perplexity than a dense model.',
        variants={'dense': {}, 'cross_task': {}}, smaller='cross_task', **PROGRAM))
