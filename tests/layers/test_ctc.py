"""CTC against the enumeration of all paths in float64, greedy decoding and edit distances by hand."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers import ctc

LOSS = jax.jit(ctc.loss)
DISTANCE = jax.jit(ctc.edit_distance)


def spelt(path):
  """The labels a path spells: repetitions merged, then blanks removed."""
  return tuple(label for label, _ in itertools.groupby(path) if label != ctc.BLANK)


def padded(rows, length):
  """(values, mask) of sequences, as rows of one length."""
  values = np.array([list(row) + [0] * (length - len(row)) for row in rows], np.int32)
  return jnp.array(values), jnp.arange(length) < jnp.array([[len(row)] for row in rows])


TARGETS = [(1,), (1, 1), (1, 2), (2, 1, 2), (), (2, 2)]
FRAMES = [5, 5, 3, 5, 2, 4]


def test_the_loss_sums_over_all_alignments():
  logits = np.random.default_rng(0).normal(size=(len(TARGETS), 5, 3)).astype(np.float32)
  targets, counted = padded(TARGETS, 3)
  frames = jnp.arange(5) < jnp.array(FRAMES)[:, None]
  expected = []
  for row, target, count in zip(logits.astype(np.float64), TARGETS, FRAMES):
    probs = np.exp(row) / np.exp(row).sum(-1, keepdims=True)
    paths = [path for path in itertools.product(range(3), repeat=count) if spelt(path) == target]
    expected.append(-np.log(sum(np.prod([probs[t, label] for t, label in enumerate(path)]) for path in paths)))
  np.testing.assert_allclose(LOSS(logits, frames, targets, counted), expected, rtol=1e-5)


def test_what_no_path_spells_counts_nothing_and_has_no_slope():
  targets, counted = padded([(1, 1), (1, 2), (1, 1)], 2)  # 'aa' needs a blank between: three frames
  frames = jnp.arange(3) < jnp.array([[2], [2], [3]])
  np.testing.assert_array_equal(ctc.alignable(frames, targets, counted), [False, True, True])
  losses, slopes = jax.value_and_grad(lambda logits: LOSS(logits, frames, targets, counted).sum())(jnp.zeros((3, 3, 3)))
  # 'ab' in two frames: one path of nine; 'aa' in three: one path of 27.
  assert float(losses) == pytest.approx(np.log(9) + np.log(27), rel=1e-5)
  assert np.isfinite(slopes).all() and (slopes[0] == 0).all()


def test_greedy_merges_repetitions_and_drops_blanks_and_padding():
  path = jnp.array([[0, 1, 1, 0, 1, 2, 2, 2]])
  labels, kept = ctc.greedy(jax.nn.one_hot(path, 3), jnp.arange(8)[None] < 8)
  assert labels[kept].tolist() == [1, 1, 2]
  labels, kept = ctc.greedy(jax.nn.one_hot(path, 3), jnp.arange(8)[None] < 5)
  assert labels[kept].tolist() == [1, 1]


@pytest.mark.parametrize('said, heard, edits', [
    ('kitten', 'sitting', 3), ('seven', 'seven', 0), ('abc', '', 3), ('', 'abc', 3), ('seven', 'eleven', 2),
    ('abc', 'xabc', 1), ('flaw', 'lawn', 2), ('', '', 0)])
def test_edit_distances_of_words(said, heard, edits):
  code = lambda word: [1 + ord(letter) - ord('a') for letter in word]
  assert DISTANCE(*padded([code(heard)], 8), *padded([code(said)], 7)).tolist() == [edits]


def test_the_edit_distance_equals_the_recursion_and_skips_labels_not_spelt():
  rng = np.random.default_rng(1)
  labels, kept = rng.integers(1, 4, (20, 6)), rng.random((20, 6)) < 0.7
  lengths = rng.integers(0, 6, 20)
  targets = rng.integers(1, 4, (20, 5))

  def recursion(a, b):
    if not a or not b:
      return len(a) + len(b)
    return min(recursion(a[1:], b) + 1, recursion(a, b[1:]) + 1, recursion(a[1:], b[1:]) + (a[0] != b[0]))

  expected = [recursion(tuple(row[mask]), tuple(target[:length]))
              for row, mask, target, length in zip(labels, kept, targets, lengths)]
  counted = np.arange(5) < lengths[:, None]
  np.testing.assert_array_equal(DISTANCE(labels, kept, targets, counted), expected)
