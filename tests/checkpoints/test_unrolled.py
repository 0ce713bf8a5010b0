"""The unrolled form of a scanned model.

Oracle: arrays that hold the number of their layer, scanned by `Stack`.
"""
import numpy as np
import pytest

from moejax.checkpoints.unrolled import Stored, stored
from moejax.functional import flatten
from moejax.layers.stack import Stack

PATTERNS = [('dense',) * 3, ('dense', 'sparse') * 3, ('dense', 'dense', 'dense', 'sparse', 'dense', 'sparse'),
            ('a', 'b', 'c', 'a', 'b', 'c', 'c')]


@pytest.mark.parametrize('kinds', PATTERNS)
def test_every_layer_of_a_scanned_stack_is_found(kinds):
  layers = {str(depth): {'w': np.full(2, depth), **({'moe': {'wi': np.full(3, depth)}} if kind == 'sparse' else {})}
            for depth, kind in enumerate(kinds)}
  views = {depth: {'moe': layer['moe']} for depth, layer in layers.items() if 'moe' in layer}  # of some kinds only
  flat = flatten({'encoder': {'blocks': Stack(kinds).scanned(layers), 'views': Stack(kinds).scanned(views)},
                  'head': np.full(4, -1)})
  found = {path: flat[place.path] if place.repeat is None else flat[place.path][place.repeat]
           for path, place in stored(flat).items()}
  expected = flatten({'encoder': {'blocks': layers, 'views': views}, 'head': np.full(4, -1)})
  assert found.keys() == expected.keys()
  for path in expected:
    np.testing.assert_array_equal(found[path], expected[path])


def test_an_unrolled_model_is_stored_as_it_is():
  flat = {'blocks/0/attention/query': np.zeros(3), 'blocks/1/moe/layers/wi': np.zeros((2, 3)), 'shared/w': np.zeros(2)}
  assert stored(flat) == {path: Stored(path) for path in flat}
