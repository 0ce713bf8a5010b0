"""The n-gram baseline against Witten and Bell's formula worked out by hand, by recursion, and as a distribution."""
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import data
from moejax.data.ngram import target_bits, trigram_baseline

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=9), min_size=1, max_size=4)


def witten_bell(word, history, train, vocab_size, order):
  """The recursion as written, over a list of (history, word) pairs."""
  pairs = [(tuple(ids[at - order + 1:at]), ids[at]) for ids in train for at in range(order - 1, len(ids))]

  def p(history):
    back = len(history)
    lower = 1 / vocab_size if back == 0 else p(history[1:])
    following = [w for h, w in pairs if h[len(h) - back:] == history]
    if not following:
      return lower
    kinds = len(set(following))
    return (following.count(word) + kinds * lower) / (len(following) + kinds)

  return p(tuple(history))


def test_bigrams_of_abab_by_hand():
  # Ids a=0, b=1, start=2; vocabulary 3; training targets of 'abab': a b a b.
  # Unigrams: c = 4, n = 2. p(a) = (2 + 2/3) / 6 = 4/9 = p(b), p(start) = (0 + 2/3) / 6 = 1/9.
  # After a: c = 2 (b b), n = 1. p(b|a) = (2 + 4/9) / 3 = 22/27, p(a|a) = (4/9) / 3 = 4/27.
  # After start: c = 1 (a), n = 1. p(a|start) = (1 + 4/9) / 2 = 13/18.
  bits = target_bits([np.array([2, 0, 1, 0, 1])], [np.array([2, 0, 1]), np.array([2, 0, 0])], order=2, vocab_size=3)
  np.testing.assert_allclose(2. ** -bits, [13 / 18, 22 / 27, 13 / 18, 4 / 27], rtol=1e-12)


@given(train=DOCUMENTS, test=DOCUMENTS, order=st.integers(1, 3))
def test_probabilities_match_the_recursion(train, test, order):
  bits = target_bits([np.array(ids) for ids in train], [np.array(ids) for ids in test], order, 4)
  expected = [witten_bell(ids[at], ids[at - order + 1:at], train, 4, order)
              for ids in test for at in range(order - 1, len(ids))]
  np.testing.assert_allclose(2. ** -bits, expected, rtol=1e-12)


@given(train=DOCUMENTS, history=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_probabilities_after_any_history_sum_to_one(train, history):
  asked = [np.array([*history, word]) for word in range(4)]
  bits = target_bits([np.array(ids) for ids in train], asked, order=3, vocab_size=4)
  assert (2. ** -bits).sum() == pytest.approx(1, rel=1e-12)


def test_a_markov_chain_is_learnt_up_to_its_entropy():
  pipeline = data.build(dict(
      name='language_model', length=64, batch_size=4, tokenizer=dict(name='ids', num_ids=8),
      source=dict(name='markov_mixture', num_components=1, num_ids=8, train_documents=2000, test_documents=1000)))
  bits = trigram_baseline(pipeline, order=2)
  assert bits['bits_per_byte'] == bits['bits_per_target']  # every id counts as a byte
  # The first token of a document costs more, 1 in 256 of them; smoothing a few thousandths of a bit.
  assert pipeline.source.component_bits - .02 < bits['bits_per_byte'] < pipeline.source.component_bits + .03


def test_bits_per_byte_include_the_bits_of_ends_but_no_bytes(tmp_path):
  (tmp_path / 'a.txt').write_text('ab\nab\n')
  files = dict(train=str(tmp_path / 'a.txt'), test=str(tmp_path / 'a.txt'))
  pipeline = data.build(dict(name='language_model', length=8, batch_size=1, tokenizer=dict(name='bytes'),
                             source=dict(name='text', files=files, document='line')))
  bits = trigram_baseline(pipeline)
  # 4 bytes, plus 2 ends.
  assert bits['bits_per_byte'] * 4 == pytest.approx(bits['bits_per_target'] * 6)


def test_orders_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='5-grams of 32000 ids do not fit 64 bits'):
    target_bits([np.zeros(5, int)], [np.zeros(5, int)], 5, 32000)


@pytest.mark.slow
def test_each_order_is_better_on_real_dialogues():
  pipeline = data.build(dict(name='language_model', length=256, batch_size=32, tokenizer=dict(name='bytes'),
                             source=dict(name='chitchat')))
  bits = [trigram_baseline(pipeline, order=order)['bits_per_byte'] for order in (1, 2, 3)]
  assert all(worse > better + .5 for worse, better in itertools.pairwise(bits))
