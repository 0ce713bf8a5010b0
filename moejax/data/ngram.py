"""A baseline for language models: an interpolated n-gram model of the same documents."""
from collections.abc import Iterable

import numpy as np


def trigram_baseline(pipeline, split: str = 'test', order: int = 3) -> dict[str, float]:
  """Bits per byte and per target on `split` of an n-gram model trained on `train`.

  It predicts the targets of `language_model`: every token of a document, and its end, from the tokens before it in the
  document.
  """
  train = list(_padded(pipeline, 'train', order))
  test, num_bytes = list(_padded(pipeline, split, order)), sum(int(size.sum()) for _, size in pipeline.documents(split))
  bits = target_bits(train, test, order, pipeline.tokenizer.vocab_size)
  return {'bits_per_byte': float(bits.sum() / num_bytes), 'bits_per_target': float(bits.mean())}


def target_bits(train: Iterable[np.ndarray], test: Iterable[np.ndarray], order: int, vocab_size: int) -> np.ndarray:
  """Bits of every target of `test` under an n-gram model of `train`, <float64>[targets].

  Documents are ids; the first `order - 1` of each are only context. With c(h, w) the count of w after the history h,
  c(h) its sum over w, n(h) the number of distinct w, and h' the history without its oldest id,

      p(w | h) = (c(h, w) + n(h) p(w | h')) / (c(h) + n(h)),    with 1 / vocab_size below the empty history

  (Witten and Bell 1991, method C, interpolated as by Chen and Goodman 1999, section 2.5). No parameters are fitted.
  """
  if vocab_size ** order >= 2 ** 63:
    raise ValueError(f'{order}-grams of {vocab_size} ids do not fit 64 bits; choose a lower order.')
  train, test = list(train), list(test)
  probability = 1 / vocab_size
  for size in range(1, order + 1):
    seen = _grams(train, size, order, vocab_size)
    asked = _grams(test, size, order, vocab_size)
    grams, counts = np.unique(seen, return_counts=True)
    histories, first = np.unique(grams // vocab_size, return_index=True)
    different = np.diff(np.append(first, len(grams)))
    totals = np.add.reduceat(counts, first)
    count = _lookup(grams, counts, asked)
    total, followers = (_lookup(histories, values, asked // vocab_size) for values in (totals, different))
    unseen = total == 0
    interpolated = (count + followers * probability) / np.where(unseen, 1, total + followers)
    probability = np.where(unseen, probability, interpolated)
  return -np.log2(probability)


def _grams(documents, size, order, vocab_size):
  """One int code for every target and the `size - 1` ids before it."""
  grams = []
  for ids in documents:
    targets = len(ids) - (order - 1)
    code = np.zeros(targets, np.int64)
    for back in range(size - 1, -1, -1):
      start = order - 1 - back
      code = code * vocab_size + ids[start:start + targets]
    grams.append(code)
  return np.concatenate(grams)


def _lookup(keys, values, wanted):
  places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[places] == wanted, values[places], 0)


def _padded(pipeline, split, order):
  start, end = pipeline.tokenizer.start, pipeline.tokenizer.end
  for ids, _ in pipeline.documents(split):
    yield np.concatenate([[start] * (order - 1), ids, [] if end is None else [end]]).astype(np.int64)
