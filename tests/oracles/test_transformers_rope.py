"""Scaled rotary frequencies against those of `transformers`, with the numbers of published configs."""
import numpy as np
import pytest

from moejax.layers.rotary import SCALINGS

pytestmark = pytest.mark.oracle

LONG = dict(short_factor=list(np.linspace(1, 3, 48)), long_factor=list(np.geomspace(1, 64, 48)))
# Sizes of heads, theta, the config of transformers, and ours. Long factors stand for the 48 numbers of Phi-3.
CASES = {
    'deepseek-v3': (64, 1e4, dict(rope_type='yarn', factor=40., original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
                                  mscale=1., mscale_all_dim=1.),
                    dict(name='yarn', factor=40., original_length=4096, mscale=1., mscale_all_dim=1.)),
    'deepseek-v2-lite': (64, 1e4, dict(rope_type='yarn', factor=40., original_max_position_embeddings=4096, beta_fast=32,
                                       beta_slow=1, mscale=0.707, mscale_all_dim=0.6),
                         dict(name='yarn', factor=40., original_length=4096, mscale=0.707, mscale_all_dim=0.6)),
    'gpt-oss': (64, 150000., dict(rope_type='yarn', factor=32., original_max_position_embeddings=4096, beta_fast=32.,
                                  beta_slow=1., truncate=False),
                dict(name='yarn', factor=32., original_length=4096, truncate=False)),
    'qwen3-moe': (128, 1e6, dict(rope_type='yarn', factor=4., original_max_position_embeddings=32768),
                  dict(name='yarn', factor=4., original_length=32768)),
    'llama-3.1': (128, 5e5, dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4.,
                                 original_max_position_embeddings=8192),
                  dict(name='llama3', factor=8., original_length=8192)),
    'llama-3.2': (64, 5e5, dict(rope_type='llama3', factor=32., low_freq_factor=1., high_freq_factor=4.,
                                original_max_position_embeddings=8192),
                  dict(name='llama3', factor=32., original_length=8192)),
    'phi-3-long': (96, 1e4, dict(rope_type='longrope', original_max_position_embeddings=4096, factor=32., **LONG),
                   dict(name='longrope', factor=32., original_length=4096, **LONG)),
    'phi-3-short': (96, 1e4, dict(rope_type='longrope', original_max_position_embeddings=4096, factor=32., **LONG),
                    dict(name='longrope', factor=32., original_length=4096, length=4096, **LONG)),
    'vicuna-16k': (128, 1e4, dict(rope_type='linear', factor=4.), dict(name='linear', factor=4.)),
    'llama-dynamic': (128, 1e4, dict(rope_type='dynamic', factor=2.),
                      dict(name='dynamic_ntk', factor=2., original_length=4096, length=10000)),
}
# The sequences that transformers is told of, and its max_position_embeddings.
LENGTHS = {'phi-3-long': (131072, 131072), 'phi-3-short': (4096, 131072), 'llama-dynamic': (10000, 4096)}


@pytest.mark.parametrize('fraction', [1., 0.5])
@pytest.mark.parametrize('name', CASES)
def test_frequencies_and_attention_factors_equal_those_of_transformers(name, fraction):
  import transformers
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  head_dim, theta, theirs, ours = CASES[name]
  width = int(head_dim * fraction)
  length, positions = LENGTHS.get(name, (None, 131072))
  cut = lambda config: {key: value[:width // 2] if isinstance(value, list) else value for key, value in config.items()}
  config = transformers.LlamaConfig(
      hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=positions,
      rope_parameters=dict(cut(theirs), rope_theta=theta, partial_rotary_factor=fraction))
  expected, factor = ROPE_INIT_FUNCTIONS[theirs['rope_type']](config, 'cpu', seq_len=length)
  scaling = SCALINGS.build(cut(ours), 'scaling')
  # Theirs are float32, whose powers of theta are off by some units in the last place.
  np.testing.assert_allclose(scaling.frequencies(theta, width), expected.numpy(), rtol=2e-6)
  assert scaling.amplitude == pytest.approx(factor, rel=1e-12)
