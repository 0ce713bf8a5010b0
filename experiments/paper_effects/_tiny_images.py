"""Overrides that make the classifiers of digits small: some seconds a run on one core."""

TINY_IMAGES = {
    'model.dim': 32, 'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64, 'training.steps': 200,
    'evaluation.every': 200, 'checkpoint.every': 200, 'optimizer.schedule.warmup': 20}
