"""'retrieval' and 'zero_shot': evaluators of models that embed images and texts in one space.

Each modality is encoded without the other, since with shared experts they would compete for capacity.
"""
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.config import ConfigError
from moejax.evaluation import passes
from moejax.evaluation.few_shot import padded
from moejax.evaluation.registry import EVALUATORS, Evaluator
from moejax.parallel import processes
from moejax.ranges import Count


@EVALUATORS('retrieval')
def retrieval(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test',
              batch_size: Count | None = None) -> Evaluator:
  """`image_to_text_recall_at_1` and `text_to_image_recall_at_1`, among all pairs of `split`.

  Any pair with the same caption is a hit: images with equal captions are all correct.

  Config:
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
  """
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('image', 'tokens', 'segments', 'valid'))
  encode = passes.MeshProgram(lambda params, state, batch: (
      _encode(apply, 'image', params, state, batch), _encode(apply, 'text', params, state, batch),
      batch['tokens'] * (batch['segments'] > 0), batch['valid']), mesh)

  def evaluate(params, router_state):
    images, texts, captions = _collect(encode, params, router_state, examples)
    return {**recalls_at_1(images, texts, captions), 'examples': float(len(images))}
  return Evaluator(evaluate, ((encode, examples.spec),))


@EVALUATORS('zero_shot')
def zero_shot(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test',
              batch_size: Count | None = None) -> Evaluator:
  """`accuracy` of the class whose captions are nearest to the image, by the normalised mean of their vectors (CLIP's
  prompt ensembles, 2103.00020, section 3.1.4). The captions come from the data's source.

  Config:
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
  """
  if not hasattr(pipeline, 'class_captions'):
    raise ConfigError(": zero-shot classification requires captions of classes. Use the pipeline 'image_text'.")
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('image', 'label', 'valid'))
  encode_images = passes.MeshProgram(lambda params, state, batch: (
      _encode(apply, 'image', params, state, batch), batch['label'], batch['valid']), mesh)
  encode_texts = passes.MeshProgram(lambda params, state, batch: (
      _encode(apply, 'text', params, state, batch), batch['class'], batch['valid']), mesh)

  def evaluate(params, router_state):
    images, labels = _collect(encode_images, params, router_state, examples)
    texts, classes = _collect(encode_texts, params, router_state, _class_batches(pipeline, mesh, examples.batch_size))
    return {'accuracy': zero_shot_accuracy(images, labels, texts, classes), 'examples': float(len(images))}

  captions = {name: examples.spec[name] for name in ('tokens', 'segments', 'valid')}
  captions['class'] = jax.ShapeDtypeStruct((examples.batch_size,), np.int32)
  return Evaluator(evaluate, ((encode_images, examples.spec), (encode_texts, captions)))


def recalls_at_1(images: np.ndarray, texts: np.ndarray, captions: np.ndarray) -> dict[str, float]:
  """Recalls of N pairs: unit vectors <float>[N,D] of each modality, and captions <int>[N,n]; equal ones are hits."""
  _, alike = np.unique(captions, axis=0, return_inverse=True)
  similarity, alike = images.astype(np.float64) @ texts.T.astype(np.float64), alike.reshape(-1)
  return {'image_to_text_recall_at_1': float((alike[similarity.argmax(1)] == alike).mean()),
          'text_to_image_recall_at_1': float((alike[similarity.argmax(0)] == alike).mean())}


def zero_shot_accuracy(images: np.ndarray, labels: np.ndarray, texts: np.ndarray, classes: np.ndarray) -> float:
  """Share of images <float>[N,D], of `labels` <int>[N], that are nearest to the mean text of their class; texts
  <float>[M,D] are of `classes` <int>[M]."""
  names = np.unique(classes)
  means = np.stack([texts[classes == name].astype(np.float64).mean(0) for name in names])
  means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
  return float((names[(images.astype(np.float64) @ means.T).argmax(-1)] == labels).mean())


def _encode(apply, modality, params, state, batch):
  fields = {'image': ('image', 'valid'), 'text': ('tokens', 'segments', 'valid')}[modality]
  return apply(params, state, {name: batch[name] for name in fields}).extras[modality]


def _collect(encode, params, state, batches) -> list[np.ndarray]:
  """The valid rows of all outputs of `encode` but the last, which is their validity, over all batches."""
  parts = [jax.device_get(encode(params, state, batch)) for batch in batches]
  *arrays, valid = (np.concatenate(x) for x in zip(*parts))
  return [array[valid] for array in arrays]


def _class_batches(pipeline, mesh, size):
  captions, classes = pipeline.class_captions()
  rows = {**captions, 'class': classes, 'valid': np.ones(len(classes), bool)}
  mine = processes.local_rows(mesh, size)
  for start in range(0, len(classes), size):
    yield processes.place(mesh, {name: padded(x[start:start + size], size)[mine] for name, x in rows.items()})
