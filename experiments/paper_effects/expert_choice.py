"""Experts that take twice as many tokens classify better than experts that take each token half as often."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Expert Choice',
    claim='Capacity factor 2 classifies better than a quarter of it (Expert Choice, figure 4).',
    config='configs/expert_choice_digits.py',
    common={'training.steps': 200, 'evaluation.every': 200, 'checkpoint.every': 200, 'optimizer.schedule.warmup': 20},
    variants={'factor 0.5': {'model.moe.router.select.capacity_factor': 0.5}, 'factor 2': {}},
    metric='eval/test/accuracy', larger='factor 2', smaller='factor 0.5')
