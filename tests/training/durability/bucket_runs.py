"""Tiny runs whose folder may be in a bucket, and what is damaged there."""
import tiny_runs

from moejax import buckets

PARTS = dict(tiny_runs.PARTS, checkpoint=dict(every=4), loggers=('csv', 'tensorboard'))


def names(folder):
  return set(buckets.objects(folder))


def damage(file):
  """Flips a bit in the middle of an object."""
  content, generation = buckets.read(file)
  middle = len(content) // 2
  buckets.write(file, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:], generation)


def data_file(folder, step, item):
  """The file that an item of a checkpoint is read from."""
  data = folder / 'checkpoints' / str(step) / item / 'd'
  name, = names(data)
  return data / name
