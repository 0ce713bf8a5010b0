"""Retrieval, zero-shot classification and label error rates against counts by hand. Fake models answer from the
batch."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import evaluation
from moejax.config import ConfigError
from moejax.evaluation.pairs import recalls_at_1, zero_shot_accuracy
from moejax.parallel import mesh as mesh_lib

MESH = mesh_lib.build(dict(data=1), devices=jax.devices()[:1])


@dataclasses.dataclass
class Fake:
  """Serves arrays of examples, the last batch padded with zeros."""
  examples: dict
  batch_size: int = 2
  splits: tuple = ('test',)

  def batch_spec(self, batch_size=None):
    return {k: jax.ShapeDtypeStruct((self.batch_size, *x.shape[1:]), x.dtype) for k, x in self.examples.items()}

  def evaluate(self, split, batch_size=None, rows=None):
    for start in range(0, len(next(iter(self.examples.values()))), self.batch_size):
      rows = {k: x[start:start + self.batch_size] for k, x in self.examples.items()}
      yield {k: np.concatenate([x, np.zeros((self.batch_size - len(x), *x.shape[1:]), x.dtype)]) for k, x in rows.items()}


class Pairs(Fake):
  """Has captions of two classes: word 1, and words 2 and 3."""

  def class_captions(self):
    tokens = np.array([[1], [2], [3]], np.int32)
    return dict(tokens=tokens, segments=np.ones_like(tokens)), np.array([0, 1, 1], np.int32)


# The vectors of words 0 to 3; images are vectors themselves.
WORDS = np.array([[0., 0.], [1., 0.], [0., 1.], [-1., 0.]], np.float32)


def encoder(params, state, batch):
  extras = {}
  if 'image' in batch:
    extras['image'] = batch['image'].reshape(-1, 2)
  if 'tokens' in batch:
    extras['text'] = jnp.array(WORDS)[batch['tokens'][:, 0]]
  assert len(extras) == 1, 'each modality is encoded without the other'
  return types.SimpleNamespace(extras=extras, routers={})


def run(name, pipeline, apply, **config):
  evaluators = evaluation.build({'test': dict(name=name, **config)}, pipeline=pipeline, apply=apply, mesh=MESH)
  return evaluators['test']({}, {})


def pairs():
  # Three pairs, two of them with the same caption. The second image points to the wrong word.
  image = np.array([[.9, .1], [.2, .8], [.1, .9]], np.float32).reshape(3, 1, 2, 1)
  tokens = np.array([[1], [1], [2]], np.int32)
  return Pairs(dict(image=image, tokens=tokens, segments=np.ones_like(tokens), valid=np.ones(3, bool),
                    label=np.array([0, 0, 1], np.int32)))


def test_recall_counts_pairs_with_the_same_caption_as_hits():
  # Nearest words: 1 for image 0 (its own), 2 for images 1 (wrong) and 2 (right). Nearest images: 0 for both texts
  # 'word 1', the second of which has the same caption, and 2 for 'word 2'.
  assert run('retrieval', pairs(), encoder) == dict(
      image_to_text_recall_at_1=pytest.approx(2 / 3), text_to_image_recall_at_1=1., examples=3.)


def test_recalls_of_distinct_captions_count_the_diagonal():
  similar = np.array([[3., 1., 2.], [1., 2., 4.], [5., 1., 3.]])
  # Rows' best columns are 0, 2, 0: one of three on the diagonal. Columns' best rows are 2, 1, 1: one of three.
  recalls = recalls_at_1(similar, np.eye(3), np.arange(3)[:, None])
  assert recalls == dict(image_to_text_recall_at_1=pytest.approx(1 / 3), text_to_image_recall_at_1=pytest.approx(1 / 3))


def test_zero_shot_takes_the_class_with_the_nearest_mean_caption():
  # Class 1 is the mean of (0,1) and (-1,0), at length 1 (-.71, .71): (.2,.8) has .42 with it and .2 with class 0, so the
  # second image is taken for class 1, wrongly; (.1,.9) is rightly.
  assert run('zero_shot', pairs(), encoder) == dict(accuracy=pytest.approx(2 / 3), examples=3.)
  images = np.array([[1., 0.], [0., 1.]])
  assert zero_shot_accuracy(images, np.array([7, 3]), np.array([[0., 2.], [.1, .1], [2., 0.]]), np.array([3, 7, 7])) == 1


def speech():
  # The frames are the logits. 0 is the blank; the transcripts are 'ab', 'a' and 'bb'.
  paths = [[1, 1, 0, 2], [1, 0, 1, 0], [2, 2, 2, 2]]
  frames = 10 * np.eye(3, dtype=np.float32)[np.array(paths)]
  segments = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], np.int32)
  return Fake(dict(frames=frames, segments=segments, targets=np.array([[1, 2], [1, 0], [2, 2]], np.int32),
                   loss_mask=np.array([[1, 1], [1, 0], [1, 1]], np.float32)))


def echo(params, state, batch):
  return types.SimpleNamespace(logits=batch['frames'], routers={})


def test_the_label_error_rate_is_edits_over_labels():
  # Decoded: 'ab' (right), 'aa' for 'a' (one insertion), 'b' for 'bb' (one deletion): 2 edits of 5 labels.
  metrics = run('label_error_rate', speech(), echo)
  assert metrics['label_error_rate'] == pytest.approx(2 / 5)
  assert metrics['accuracy'] == pytest.approx(1 / 3) and metrics['examples'] == 3
  assert np.isfinite(metrics['loss']) and metrics['loss'] > 0


@pytest.mark.parametrize('name, pipeline', [
    ('retrieval', speech()), ('zero_shot', speech()), ('label_error_rate', pairs())])
def test_batches_that_cannot_be_measured_are_refused(name, pipeline):
  with pytest.raises(ConfigError, match='config.evaluation.evaluators.test'):
    run(name, pipeline, echo)
