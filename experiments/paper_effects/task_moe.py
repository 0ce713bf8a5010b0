"""Task-level MoE (2110.03742, section 4.4): what a task uses can be taken out and served as a dense model."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Task-level MoE', claim='The dense model extracted for a task says the same as the full one, faster.',
    program='experiments.paper_effects.programs.task_throughput', variants={'full': {}, 'extracted': {}},
    metric='bytes_per_second', larger='extracted', smaller='full')
