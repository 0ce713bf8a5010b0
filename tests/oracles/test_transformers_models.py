"""Whole models against `transformers`: the same weights and inputs give the same logits.

Their weights are random and large, so that no two routers' scores tie and every layer matters. Everything is float32
on both sides; tolerances are what sums in another order leave after a few layers.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.layers.stack import Stack
from moejax.routing import papers

pytestmark = pytest.mark.oracle

TOKENS = np.random.default_rng(0).integers(1, 50, (2, 12))


def logits(config, params, batch):
  """Ours, by a model whose parameter tree must be exactly `params`; router outputs come along."""
  model = models.build(config)
  shapes, state = model.shapes()
  assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, params)
  output = jax.jit(model.apply)(params, state, jax.tree.map(jnp.asarray, batch))
  return np.asarray(output.logits), output


def check(ours, theirs):
  theirs = theirs.numpy()
  assert theirs.std() > 0.3  # the comparison can tell models apart
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


LLAMA = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
             vocab_size=50, rms_norm_eps=1e-5, attn_implementation='eager', tie_word_embeddings=False)


def decoder(theta, **options):
  return dict(name='decoder', vocab_size=50, dim=16, num_layers=3, attention=dict(heads=4, kv_heads=2),
              feed_forward=dict(hidden=24, activation='swiglu'), norm=dict(name='rms_norm', epsilon=1e-5),
              positions=dict(name='rope', theta=theta)) | options


@pytest.mark.parametrize('stacking', ['unrolled', 'scan'])
def test_decoder_equals_llama(stacking):
  import torch
  import torch_weights
  import transformers
  config = transformers.LlamaConfig(**LLAMA, rope_parameters=dict(rope_type='default', rope_theta=500.))
  theirs = torch_weights.randomise(transformers.LlamaForCausalLM(config))
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS)).logits
  params = torch_weights.llama(theirs, head_dim=4)
  if stacking == 'scan':
    params = params | dict(blocks=Stack(('dense',) * 3).scanned(params['blocks']))
  check(logits(decoder(500., stacking=stacking), params, dict(tokens=TOKENS))[0], expected)


@pytest.mark.parametrize('dispatch', ['grouped', 'reference'])
def test_sparse_decoder_equals_mixtral(dispatch):
  import torch
  import torch_weights
  import transformers
  config = transformers.MixtralConfig(**LLAMA, num_local_experts=6, num_experts_per_tok=2, sliding_window=None,
                                      rope_parameters=dict(rope_type='default', rope_theta=1e6))
  theirs = torch_weights.randomise(transformers.MixtralForCausalLM(config))
  theirs.set_experts_implementation('eager')
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS), output_router_logits=True)
  moe = dict(num_experts=6, experts=dict(name='feed_forward', hidden=24, activation='swiglu'),
             router=papers.top_k_dropless(k=2, balance=1.), dispatch=dict(name=dispatch))
  ours, output = logits(decoder(1e6, moe=moe, sparse=dict(name='every', n=1)), torch_weights.llama(theirs, head_dim=4),
                        dict(tokens=TOKENS))
  check(ours, expected.logits)
  # Each token's experts, layer by layer.
  for router, scores in zip(output.routers.values(), expected.router_logits):
    chosen = np.sort(torch.topk(scores, 2).indices.numpy())
    np.testing.assert_array_equal(np.sort(np.asarray(router.plan.expert).reshape(-1, 2)), chosen)


def side(feed_forward, **options):
  return dict(num_layers=4, attention=dict(heads=4, head_dim=6, scale='none'), feed_forward=feed_forward) | options


T5 = dict(vocab_size=50, d_model=16, d_kv=6, d_ff=24, num_heads=4, num_layers=4, num_decoder_layers=4,
          relative_attention_num_buckets=8, relative_attention_max_distance=20, attn_implementation='eager')
POSITIONS = dict(name='relative_bias', buckets=8, max_distance=20)
SOURCES = np.random.default_rng(1).integers(1, 50, (2, 15))
SEGMENTS = np.where(np.arange(15) < np.asarray([[15], [9]]), 1, 0)


def pair(theirs):
  import torch
  with torch.no_grad():
    expected = theirs(input_ids=torch.tensor(SOURCES), attention_mask=torch.tensor(SEGMENTS),
                      decoder_input_ids=torch.tensor(TOKENS)).logits
  return expected, dict(encoder_tokens=SOURCES, encoder_segments=SEGMENTS, decoder_tokens=TOKENS)


def test_encoder_decoder_equals_t5_1_1():
  import torch
  import torch_weights
  import transformers
  config = transformers.T5Config(**T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False)
  theirs = transformers.T5ForConditionalGeneration(config)
  # The config's argument stops T5's scaling of the decoder's outputs, but leaves the head tied: 1.1 has its own.
  theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.shared.weight))
  torch_weights.randomise(theirs)
  expected, batch = pair(theirs)
  one = side(dict(hidden=24, activation='geglu'))
  params = torch_weights.t5(theirs, head_dim=6, feed_forward=dict(wg='wi_0', wi='wi_1', wo='wo'))
  ours, _ = logits(dict(name='encoder_decoder', vocab_size=50, dim=16, encoder=one, decoder=one, positions=POSITIONS),
                   params, batch)
  check(ours, expected)


@pytest.mark.parametrize('capacity', [64, 2], ids=['enough', 'tokens are dropped'])
def test_sparse_encoder_decoder_equals_switch_transformers(capacity):
  import torch
  import torch_weights
  import transformers
  config = transformers.SwitchTransformersConfig(
      **T5, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=capacity,
      feed_forward_proj='relu', tie_word_embeddings=True)
  theirs = torch_weights.randomise(transformers.SwitchTransformersForConditionalGeneration(config))
  # Their padding tokens take part in routing, so there are none here.
  batch = dict(encoder_tokens=SOURCES[:, :12], decoder_tokens=TOKENS)
  with torch.no_grad():
    expected = theirs(input_ids=torch.tensor(batch['encoder_tokens']), decoder_input_ids=torch.tensor(TOKENS)).logits
  # Their capacity is a number of slots per sequence: 12 tokens for 4 experts, so a factor of 1 is 3 slots.
  router = papers.switch() | dict(place=dict(name='capacity', capacity_factor=min(capacity, 12) / 3))
  moe = dict(num_experts=4, experts=dict(name='feed_forward', hidden=24, activation='relu'), router=router,
             dispatch=dict(name='gather'), group='sequence')
  one = side(dict(hidden=24, activation='relu'), moe=moe, sparse=dict(name='every', n=2))
  params = torch_weights.t5(theirs, head_dim=6, feed_forward=dict(wi='wi', wo='wo'))
  ours, output = logits(dict(name='encoder_decoder', vocab_size=50, dim=16, encoder=one, decoder=one,
                             positions=POSITIONS, head='tied_scaled'), params, batch)
  check(ours, expected)
  dropped = [float(router.metrics['dropped']) for router in output.routers.values()]
  assert (max(dropped) > 0.1) == (capacity == 2)


def test_vision_transformer_equals_vit():
  import torch
  import torch_weights
  import transformers
  config = transformers.ViTConfig(
      hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4,
      num_channels=3, num_labels=5, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, attn_implementation='eager')
  theirs = torch_weights.randomise(transformers.ViTForImageClassification(config))
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).logits
  ours, _ = logits(
      dict(name='vision', image_size=8, patch_size=4, num_classes=5, dim=16, num_layers=3, pool='token',
           attention=dict(heads=4, use_bias=True), feed_forward=dict(hidden=24, use_bias=True)),
      torch_weights.vit(theirs, head_dim=4), dict(image=images))
  check(ours, expected)
