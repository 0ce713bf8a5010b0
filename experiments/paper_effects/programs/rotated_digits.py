"""Accuracy of configs/gmoe_digits.py on digits of a rotation that training never sees."""
import jax
import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

from configs import gmoe_digits
from experiments.paper_effects.programs import command, training

VARIANTS = ('dense', 'cosine router')
ANGLES, UNSEEN, BATCH = (0, 15, 30, 45), 60, 64


def measure(variant: str, seed: int) -> dict[str, float]:
  """Trained on four rotations, tested on a fifth, of other digits."""
  config = gmoe_digits.get_config()
  config.data.batch_size, config.training.steps = BATCH, 250
  if variant == 'dense':
    config.model.sparse = dict(name='none')
  digits = load_digits()
  images, labels = digits.images / 16, digits.target
  train, test = np.arange(len(labels)) % 5 != 0, np.arange(len(labels)) % 5 == 0

  def batch(picked, angles):
    turned = [ndimage.rotate(images[i], angle, reshape=False, order=1) for i, angle in zip(picked, angles)]
    return dict(image=np.float32(turned)[..., None] * 2 - 1, label=np.int32(labels[picked]),
                valid=np.ones(len(picked), bool))

  def batches():
    rng = np.random.default_rng(seed)
    while True:
      yield batch(rng.choice(np.flatnonzero(train), BATCH), rng.choice(ANGLES, BATCH))

  built, state = training.trained(config, seed, batches())
  accuracy = jax.jit(lambda batch: built.objective(
      built.model.apply(state.params, state.router_state, batch), batch)[1]['accuracy'])
  picked = np.flatnonzero(test)[:5 * BATCH].reshape(-1, BATCH)
  on = lambda angle: float(np.mean([accuracy(batch(rows, [angle] * BATCH)) for rows in picked]))
  return dict(unseen=on(UNSEEN), seen=on(ANGLES[1]))


if __name__ == '__main__':
  command.main(measure, VARIANTS)
