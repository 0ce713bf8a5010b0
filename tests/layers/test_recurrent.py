"""The LSTM against Flax's, the reset of its state, and the recurrent language model."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import functional as functional_lib
from moejax import models
from moejax.config import ConfigError
from moejax.layers.mixers.lstm import LSTM
from moejax.routing import papers

B, S, D = 2, 6, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)
FIRST = jnp.broadcast_to(jnp.arange(S) == 0, (B, S))


def lstm():
  layer = LSTM(dim=D, dtype=jnp.float32, rngs=nnx.Rngs(0))
  generator = np.random.default_rng(1)
  for variable in (layer.kernel, layer.recurrent_kernel, layer.bias):
    variable[...] = jnp.asarray(generator.normal(size=variable.shape), jnp.float32)
  return layer


run = jax.jit(lambda x, starts: lstm().run(x, starts))


def test_the_lstm_equals_flax():
  ours = lstm()
  theirs = nnx.OptimizedLSTMCell(D, D, rngs=nnx.Rngs(0))
  theirs.dense_i.kernel[...] = ours.kernel[...]
  theirs.dense_h.kernel[...] = ours.recurrent_kernel[...]
  theirs.dense_h.bias[...] = ours.bias[...]
  carry, expected = (jnp.zeros((B, D)), jnp.zeros((B, D))), []
  for t in range(S):
    carry, hidden = theirs(carry, X[:, t])
    expected.append(hidden)
  np.testing.assert_allclose(run(X, FIRST), np.stack(expected, axis=1), atol=1e-6)


def test_the_forget_gate_starts_open():
  bias = LSTM(dim=D, dtype=jnp.float32, rngs=nnx.Rngs(0)).bias[...]
  np.testing.assert_array_equal(bias, [0] * D + [1] * D + [0] * 2 * D)


def test_a_document_starts_from_nothing_wherever_it_lies():
  starts = FIRST.at[:, 3].set(True)
  packed = run(X, starts)
  second_first = jnp.roll(X, -3, axis=1)
  np.testing.assert_allclose(packed[:, 3:], run(second_first, FIRST)[:, :3], atol=1e-6)
  np.testing.assert_allclose(packed[:, :3], run(X, FIRST)[:, :3], atol=1e-6)
  assert not np.allclose(packed[:, 3:], run(X, FIRST)[:, 3:])


def model(**changes):
  return models.build(dict(
      name='lstm', vocab_size=13, dim=8, moe=dict(
          num_experts=4, experts=dict(name='feed_forward', hidden=6, activation='relu'),
          router=papers.sparsely_gated(k=2), dispatch=dict(name='grouped'))) | changes)


TOKENS = jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6]])


def parameters(functional):
  generator = np.random.default_rng(2)
  return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0, 0.5, leaf.shape), jnp.float32),
                      functional.shapes()[0])


@pytest.fixture(scope='module')
def built():
  functional = model()
  params = parameters(functional)
  apply = jax.jit(lambda batch: functional.apply(params, {}, batch))
  return functional, params, apply


def test_a_token_depends_on_no_later_one_and_on_all_earlier_ones(built):
  apply = built[2]
  before = apply(dict(tokens=TOKENS)).logits
  for position in range(6):
    after = apply(dict(tokens=TOKENS.at[1, position].set(0))).logits
    np.testing.assert_array_equal(before[1, :position], after[1, :position])
    assert (np.abs(before[1, position:] - after[1, position:]).max(-1) > 0).all()


def test_packed_documents_get_the_logits_they_get_alone(built):
  apply = built[2]
  packed = apply(dict(tokens=TOKENS, segments=jnp.asarray([[1, 1, 1, 2, 2, 2]] * 2),
                      positions=jnp.asarray([[0, 1, 2, 0, 1, 2]] * 2))).logits
  alone = apply(dict(tokens=TOKENS.reshape(4, 3))).logits
  np.testing.assert_allclose(packed, alone.reshape(packed.shape), atol=1e-5)  # sums in another order


@pytest.mark.parametrize('mixture_output', ['sigmoid', 'linear'])
def test_it_is_embedding_lstm_mixture_lstm_softmax_with_residuals(built, mixture_output):
  """Applies its layers in order; each of them is tested by itself."""
  functional = model(mixture_output=mixture_output)
  params = built[1]
  out = jax.jit(functional.apply)(params, {}, dict(tokens=TOKENS))
  assert list(out.routers) == ['block_01']

  def recurrent(x, weights):
    layer = functional_lib.functionalize(lambda rngs: LSTM(dim=8, dtype=jnp.float32, rngs=rngs), LSTM.run)
    return layer.apply(weights, {}, x, jnp.broadcast_to(jnp.arange(6) == 0, TOKENS.shape))

  x = params['embedding']['table'][TOKENS]
  x = x + recurrent(x, params['blocks']['0']['lstm'])
  weight = out.routers['block_01'].plan.to_dense().weight.reshape(2, 6, 4)
  experts = params['blocks']['1']['moe']['experts']
  mixed = jnp.einsum('bse,bsed->bsd', weight, jnp.einsum(
      'bsef,efd->bsed', jax.nn.relu(jnp.einsum('bsd,edf->bsef', x, experts['wi'])), experts['wo']))
  x = x + (jax.nn.sigmoid(mixed) if mixture_output == 'sigmoid' else mixed)
  x = x + recurrent(x, params['blocks']['2']['lstm'])
  np.testing.assert_allclose(out.logits, x @ params['head']['linear']['kernel'], rtol=1e-4, atol=1e-4)


def test_routers_that_see_the_future_are_refused():
  with pytest.raises(ConfigError, match='config.model.moe.router cannot be used in a decoder'):
    model(moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=6), router=papers.expert_choice(),
                   dispatch=dict(name='gather')))
