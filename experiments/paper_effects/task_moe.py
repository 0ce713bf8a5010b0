"""Task-level MoE (2110.03742, table 3): routed by task, a model beats the dense one that each task's extract is."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Task-level MoE', claim='Routed by task, a model has a lower perplexity than a dense one of its active size.',
    program='experiments.paper_effects.programs.domains', variants={'dense': {}, 'task': {}, 'token': {}},
    metric='eval/test/perplexity', larger='dense', smaller='task')
