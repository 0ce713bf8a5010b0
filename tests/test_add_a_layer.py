"""docs/add_a_layer.md works as it stands: its code is run from its text."""
import pathlib
import re

import jax
import numpy as np

from moejax import models
from moejax.training import setup

PAGE = pathlib.Path(__file__).parents[1] / 'docs/add_a_layer.md'
WINDOW, MIXER, TEST = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)


def test_a_window_in_every_second_layer_is_a_config():
  scope = {}
  exec(WINDOW, scope)
  config = scope['get_config']()
  assert setup.build(config).config.model.pattern.kinds == ('local', 'full')
  model = models.build(config.model)
  cache = jax.eval_shape(lambda: model.init_cache(1, 100))['blocks']
  assert [cache[str(depth)]['attention']['keys'].shape[1] for depth in range(config.model.num_layers)] == [
      32 if depth % 2 == 0 else 100 for depth in range(config.model.num_layers)]


def test_a_sublayer_is_a_file():
  scope = {'__name__': 'short_convolution'}
  exec(MIXER, scope)
  exec(TEST, scope)
  scope['test_chunks_equal_the_whole_and_a_scan_equals_separate_layers']()


def test_the_convolution_equals_its_definition():
  """Token by token, in float64."""
  scope = {'__name__': 'short_convolution'}
  exec(MIXER, scope)
  model = models.build(dict(name='decoder', vocab_size=30, dim=8, num_layers=1, positions=dict(name='none'),
                            blocks=dict(a=dict(mixer=dict(name='short_convolution', pre_norm=None)))))
  params, _ = model.init(jax.random.key(0))
  tokens = np.random.default_rng(1).integers(1, 30, (1, 6), np.int32)
  segments, positions = np.array([[1, 1, 1, 2, 2, 0]], np.int32), np.array([[0, 1, 2, 0, 1, 0]], np.int32)
  found = model.apply(params, {}, dict(tokens=tokens, segments=segments, positions=positions)).features[0]
  mixer = jax.tree.map(np.float64, params['blocks']['0']['mixer'])
  x = np.float64(params['embedding']['table'])[tokens[0]]
  gate, after, z = np.split(x @ mixer['into']['kernel'], 3, axis=-1)
  for now in range(5):
    y = sum(mixer['kernel'][back] * (gate * z)[now - back] for back in range(positions[0, now] + 1))
    out = x[now] + (after[now] * y) @ mixer['out']['kernel']
    np.testing.assert_allclose(found[now], out / np.sqrt(np.square(out).mean() + 1e-6), atol=1e-4)
