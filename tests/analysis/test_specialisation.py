"""Tables of labels by experts and their mutual information, against values worked out by hand."""
import math

import numpy as np
import pytest

from moejax.analysis import specialisation, token_kinds
from moejax.data.tokenizers import Bytes


def test_an_expert_per_label_has_all_information():
  assert specialisation.normalised_mutual_information(np.diag([3., 1., 2.])) == pytest.approx(1)


def test_independent_labels_and_experts_share_nothing():
  assert specialisation.normalised_mutual_information(np.outer([1., 2., 3.], [4., 1.])) == pytest.approx(0, abs=1e-12)


def test_mutual_information_of_a_small_table_by_hand():
  # Labels 1/2, 1/2. Label 0 always to expert 0, label 1 evenly to both: experts 3/4, 1/4.
  # H(label) = ln 2; H(expert) = 3/4 ln(4/3) + 1/4 ln 4; H(both) of (1/2, 1/4, 1/4) = 1/2 ln 2 + 1/2 ln 4 = 3/2 ln 2.
  label, expert = math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
  expected = (label + expert - 1.5 * math.log(2)) / ((label + expert) / 2)
  assert specialisation.normalised_mutual_information(np.array([[2., 0.], [1., 1.]])) == pytest.approx(expected)


def test_a_single_label_or_nothing_at_all_shares_nothing():
  assert specialisation.normalised_mutual_information(np.array([[5.]])) == 0
  assert specialisation.normalised_mutual_information(np.zeros((2, 2))) == 0


def test_shuffling_leaves_the_information_of_an_unrelated_label():
  rng = np.random.default_rng(0)
  labels = rng.integers(4, size=400)
  members, related, unrelated = (specialisation.membership(x, 4) for x in (labels, labels, rng.integers(4, size=400)))
  measure = lambda share: specialisation.normalised_mutual_information(specialisation.table(members, share))
  assert measure(related) > 10 * specialisation.chance_level(members, related)
  # (4-1)(4-1)/(2 * 400) nats are expected by chance, over an entropy of ln 4.
  assert specialisation.chance_level(members, unrelated) < 5 * 9 / 800 / math.log(4)


def test_shares_scale_the_weights_of_a_token_and_leave_dropped_tokens_out():
  np.testing.assert_array_equal(specialisation.shares(np.array([[1., 3.], [0., 0.]])), [[0.25, 0.75], [0., 0.]])


def test_lift_is_1_without_preference_and_nan_without_data():
  np.testing.assert_allclose(specialisation.lift(np.outer([1., 2.], [3., 4.])), 1)
  # Label 0: all 2 of 2 to expert 0, which gets 2 of 4 overall: twice. Label 2 never occurs.
  lift = specialisation.lift(np.array([[2., 0.], [0., 2.], [0., 0.]]))
  np.testing.assert_array_equal(lift, [[2., 0.], [0., 2.], [np.nan, np.nan]])


def test_the_most_telling_labels_are_those_with_a_preference():
  counts = np.array([[5., 5.], [10., 0.], [5., 5.], [0., 10.]])
  np.testing.assert_array_equal(specialisation.most_telling([counts], 2), [1, 3])


@pytest.mark.parametrize('text, kind', [
    ('a', 'vowel'), ('z', 'consonant'), ('Q', 'capital letter'), (' the', 'word or part of one'),
    ('The', 'capitalised word'), ('42', 'digits'), ('?!', 'punctuation'), ('$', 'punctuation'), (' ', 'space'),
    ('\n', 'line break'), ('é', 'non-ASCII'), ('a1', 'mixed'), ('', 'special')])
def test_kinds_of_tokens(text, kind):
  assert token_kinds.kind(text) == kind


def test_kinds_of_the_ids_of_a_tokenizer():
  tokenizer = Bytes()
  ids = np.array([[tokenizer.start, *b'Ab1'], [*b'e z', tokenizer.end]])
  kinds, names = token_kinds.kinds_of(tokenizer, ids)
  assert [[names[kind] for kind in row] for row in kinds] == [
      ['special', 'capital letter', 'consonant', 'digits'], ['vowel', 'space', 'consonant', 'special']]
