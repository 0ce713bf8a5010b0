"""Overrides that make the decoders on dialogues small: some seconds a run on one core."""

TINY_TEXT = {
    'model.dim': 64, 'model.moe.experts.hidden': 128, 'model.feed_forward.hidden': 128,
    'data.length': 64, 'data.batch_size': 16, 'data.source.test_fraction': 0.002,
    'training.steps': 200, 'optimizer.schedule.warmup': 20, 'evaluation.every': 200, 'checkpoint.every': 200}
