"""Sparse layer layouts against the layers in papers and their code."""
import pytest

from moejax.config import ConfigError, at
from moejax.layers import pattern


def sparse_layers(num_layers, **config):
  with at('config.model'):
    kinds = pattern.dense_or_sparse(config, num_layers)
  assert len(kinds) == num_layers
  return [layer for layer, kind in enumerate(kinds) if kind == 'sparse']


def test_vmoe_every_2_and_last_2_of_s32():
  # google-research/vmoe: S has 8 layers; Every-2 is (1, 3, 5, 7), Last-2 is (5, 7).
  assert sparse_layers(8, name='every', n=2) == [1, 3, 5, 7]
  assert sparse_layers(8, name='last', n=2) == [5, 7]


def test_last_means_odd_layers_also_where_the_depth_is_odd():
  assert sparse_layers(7, name='last', n=2) == [3, 5]


def test_st_moe_base_has_three_of_twelve():
  assert sparse_layers(12, name='every', n=4) == [3, 7, 11]


def test_glam_starts_with_a_sparse_layer():
  assert sparse_layers(8, name='every', n=2, first=0) == [0, 2, 4, 6]


def test_soft_moe_replaces_the_last_six():
  assert sparse_layers(12, name='top', n=6) == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize('num_layers', [5, 6, 12])
@pytest.mark.parametrize('n', [0, 1, 2, 3, 5])
def test_the_layouts_of_flaxformer(num_layers, n):
  # Its definitions: bottom i < n; middle L-n <= 2i < L+n; top i >= L-n.
  L = num_layers
  assert sparse_layers(L, name='bottom', n=n) == [i for i in range(L) if i < n]
  assert sparse_layers(L, name='middle', n=n) == [i for i in range(L) if L - n <= 2 * i < L + n]
  assert sparse_layers(L, name='top', n=n) == [i for i in range(L) if i >= L - n]


def test_none_and_named_layers():
  assert sparse_layers(4, name='none') == []
  assert sparse_layers(4, name='layers', indices=[3, 0]) == [0, 3]


@pytest.mark.parametrize('config', [dict(name='layers', indices=[4]), dict(name='last', n=3), dict(name='top', n=5),
                                    dict(name='bottom', n=5), dict(name='middle', n=5)])
def test_layers_that_do_not_exist_are_refused(config):
  with pytest.raises(ConfigError, match='config.model.sparse'):
    sparse_layers(4, **config)
