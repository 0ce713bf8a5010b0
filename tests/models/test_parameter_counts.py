"""Parameter counts of named sizes: against published totals and against formulas derived by hand. Traced only."""
import jax
import jax.numpy as jnp
import pytest

import tiny
from moejax import models
from moejax.routing import papers

SIZES = dict(S=(8, 512, 2048, 8), B=(12, 768, 3072, 12), L=(24, 1024, 4096, 16), H=(32, 1280, 5120, 16))


def vit(size, patch, **options):
  layers, dim, hidden, heads = SIZES[size]
  return dict(name='vision', image_size=224, patch_size=patch, num_classes=1000, dim=dim, num_layers=layers,
              attention=dict(heads=heads, use_bias=True), feed_forward=dict(hidden=hidden, use_bias=True),
              stacking='scan') | options


def count(config, batch):
  return models.parameter_counts(models.build(config), batch)


IMAGES = dict(image=jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))


# Published with the checkpoints of torchvision, whose ViTs have a class token and a head for 1000 classes.
@pytest.mark.parametrize('size, patch, total', [('B', 16, 86_567_656), ('B', 32, 88_224_232), ('L', 16, 304_326_632),
                                                ('L', 32, 306_535_400), ('H', 14, 632_045_800)])
def test_vision_transformers_have_the_published_numbers_of_parameters(size, patch, total):
  assert count(vit(size, patch, pool='token'), IMAGES) == dict(total=total, active=total)


def test_vmoe_s32_last_2():
  layers, dim, hidden, _ = SIZES['S']
  expert = 2 * dim * hidden + hidden + dim
  dense = ((32 * 32 * 3 + 1) * dim + 49 * dim           # patches, positions
           + layers * (4 * dim * dim + 4 * dim          # attention
                       + 4 * dim)                       # two norms
           + (layers - 2) * expert + 2 * dim            # feed-forward, final norm
           + (dim + 1) * 1000)                          # head
  router = 2 * dim * 8
  moe = dict(num_experts=8, experts=dict(name='feed_forward', hidden=hidden, use_bias=True), router=papers.vmoe(k=2),
             dispatch=dict(name='gather'))
  counts = count(vit('S', 32, moe=moe, sparse=dict(name='last', n=2)), IMAGES)
  assert counts == dict(total=dense + router + 2 * 8 * expert, active=dense + router + 2 * 2 * expert)


def test_mixtral_8x7b():
  layers, dim, hidden, vocab, kv = 32, 4096, 14336, 32000, 8 * 128
  rest = 2 * vocab * dim + layers * (2 * dim * dim + 2 * dim * kv + 8 * dim + 2 * dim) + dim
  expert = 3 * dim * hidden
  config = dict(name='decoder', vocab_size=vocab, dim=dim, num_layers=layers, attention=dict(heads=32, kv_heads=8),
                feed_forward=dict(hidden=hidden), sparse=dict(name='every', n=1), stacking='scan',
                moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=hidden, activation='swiglu'),
                         router=papers.top_k_dropless(k=2), dispatch=dict(name='grouped')))
  counts = count(config, dict(tokens=jax.ShapeDtypeStruct((1, 8), jnp.int32)))
  assert counts == dict(total=rest + layers * 8 * expert, active=rest + layers * 2 * expert)
  # The paper's 47B and 13B.
  assert round(counts['total'] / 1e9) == 47 and round(counts['active'] / 1e9) == 13


def test_expert_choice_has_as_many_active_experts_as_slots_per_token():
  # Two sides: 4 experts of 2*8*8 weights. Encoder: capacity factor 2, so 2 experts a token; decoder: Switch, 1.
  config = tiny.encoder_decoder(papers.expert_choice(capacity_factor=2.), tiny.SWITCH)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  counts = count(config, dict(encoder_tokens=tokens, decoder_tokens=tokens))
  assert counts['total'] - counts['active'] == (4 - 2) * 128 + (4 - 1) * 128


TOKENS = dict(tokens=jax.ShapeDtypeStruct((2, 8), jnp.int32))
SEGMENTS = tiny.decoder(papers.multi_hash(vocab_size=13, hashes=2))
SEGMENTS['moe'].update(experts=dict(name='segments', segments=2, hidden=16, activation='relu'),
                       dispatch=dict(name='segments'))
BALANCED = tiny.decoder(papers.strictly_balanced(k=2), routing_leak='train')
BALANCED['moe'].update(dispatch=dict(name='grouped'), group='sequence')
RETRIES = tiny.decoder(papers.switch(overflow='retry'), routing_leak='slots')


@pytest.mark.parametrize('config, inactive, experts, router', [
    # 2 hashes, 4 experts; a segment of an expert has 8*8 and 16*4 weights, and a token passes one of each hash.
    (SEGMENTS, 2 * (4 - 1) * (8 * 8 + 16 * 4), 2 * (8 * 8 + 16 * 4), 0),
    # In training experts of 2*8*8 weights take two a token; at evaluation a token takes all above their thresholds.
    (BALANCED, (4 - 2) * 128, 2 * 128, 8 * 4),
    # One expert, or its next best.
    (RETRIES, (4 - 1) * 128, 128, 8 * 4),
])
def test_active_parameters_count_computed_experts_not_the_choices_of_the_plan(config, inactive, experts, router):
  """Inactive and active weights of experts and router, in addition to the dense model's."""
  counts = count(config, TOKENS)
  assert counts['total'] - counts['active'] == inactive
  flops = [models.forward_flops(models.build(one), TOKENS) for one in (config, tiny.decoder())]
  assert flops[0] - flops[1] == 2 * 8 * 2 * (experts + router - 2 * 8 * 16)  # 2*8 tokens, a product and a sum


def test_parts_are_experts_routers_and_all_else_whatever_a_routers_parameters_are_called():
  """One of two layers of width 8 is sparse; X-MoE's router has a projection [8,4] and embeddings of 4 experts [4,4],
  stored as `router/score/experts`, and a temperature; every token uses them all, and one of the experts."""
  parts = models.parameters_by_part(models.build(tiny.decoder(papers.xmoe(dim=4), routing_leak='slots')), TOKENS)
  block = 4 * 8 * 8 + 8 + 8  # attention, scales of two norms
  assert parts == dict(experts=(4 * 2 * 8 * 8, 2 * 8 * 8), routers=(8 * 4 + 4 * 4 + 1,) * 2,
                       blocks=(2 * block + 2 * 8 * 16,) * 2, embedding=(13 * 8,) * 2, final_norm=(8, 8),
                       head=(13 * 8,) * 2)


def test_multi_hash_layers_have_the_active_parameters_and_flops_of_the_dense_model():
  from configs import dense_chitchat, multi_hash_chitchat
  batch = dict(tokens=jax.ShapeDtypeStruct((1, 128), jnp.int32))
  dense, sparse = (models.build(config.get_config().model) for config in (dense_chitchat, multi_hash_chitchat))
  # Embedding and head, and in each of two layers attention, SwiGLU of 384 units and two norms; a norm at the end.
  dim = 128
  total = 2 * 258 * dim + 2 * (4 * dim**2 + 3 * dim * 384 + 2 * dim) + dim
  assert models.parameter_counts(dense, batch)['total'] == total == 492_672
  assert models.parameter_counts(sparse, batch)['active'] == total
  assert models.forward_flops(sparse, batch) == models.forward_flops(dense, batch)


@pytest.mark.parametrize('dispatch', ['reference', 'einsum', 'gather', 'grouped'])
def test_forward_flops_are_model_flops_for_any_dispatcher(dispatch):
  """Two layers of width 8 on 3 sequences of 5 tokens; 13 words; the second has 4 experts of 8 hidden units, one
  active per token.

  FLOPs of a token in all layers: attention 4*2*8*8 and 2*2*5*8 with 5 keys; in the first the feed-forward 2*2*8*16; in
  the second the router 2*8*4 and an expert 2*2*8*8; at the end the head 2*8*13.
  """
  config = tiny.decoder(tiny.SWITCH)
  config['moe']['dispatch'] = dict(name=dispatch)
  token = 2 * (4 * 2 * 8 * 8 + 2 * 2 * 5 * 8) + 2 * 2 * 8 * 16 + 2 * 8 * 4 + 2 * 2 * 8 * 8 + 2 * 8 * 13
  batch = dict(tokens=jax.ShapeDtypeStruct((3, 5), jnp.int32))
  assert models.forward_flops(models.build(config), batch) == 3 * 5 * token
