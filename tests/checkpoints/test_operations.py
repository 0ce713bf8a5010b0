"""What rules do to arrays. Oracle of resizing: `scipy.ndimage.zoom`, as in the code of ViT (2010.11929)."""
import numpy as np
import pytest
import scipy.ndimage

from moejax.checkpoints import operations

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('old, new', [(4, 7), (7, 4), (5, 5), (2, 9), (9, 1), (1, 3)])
def test_a_table_is_interpolated_along_its_length(old, new):
  table = RNG.normal(size=(old, 3))
  np.testing.assert_allclose(operations.resize(table, new), scipy.ndimage.zoom(table, (new / old, 1), order=1), atol=1e-12)


@pytest.mark.parametrize('old, new', [(4, 7), (7, 4), (3, 3)])
@pytest.mark.parametrize('prefix', [0, 1])
def test_a_grid_is_interpolated_along_both_sides_and_the_class_token_kept(old, new, prefix):
  table = RNG.normal(size=(prefix + old**2, 3))
  zoomed = scipy.ndimage.zoom(table[prefix:].reshape(old, old, 3), (new / old, new / old, 1), order=1)
  np.testing.assert_allclose(operations.resize_grid(table, prefix + new**2),
                             np.concatenate([table[:prefix], zoomed.reshape(new**2, 3)]), atol=1e-12)


@pytest.mark.parametrize('do, ours, source, count, fits', [
    ('copy', (2, 3), (2, 3), 1, True), ('copy', (2, 3), (3, 2), 1, False), ('copy', (), (), 1, True),
    ('repeat', (8, 2, 3), (2, 3), 1, True), ('repeat', (8, 2, 3), (8, 2, 3), 1, False), ('repeat', (8,), (), 1, True),
    ('stack', (2, 5), (5,), 2, True), ('stack', (3, 5), (5,), 2, False),
    ('mean', (5,), (5,), 2, True), ('mean', (5,), (4,), 2, False),
    ('resize', (9, 4), (6, 4), 1, True), ('resize', (9, 4), (9, 5), 1, False), ('resize', (), (), 1, False),
    ('resize_grid', (9, 4), (16, 4), 1, True), ('resize_grid', (10, 4), (17, 4), 1, True),
    ('resize_grid', (9, 4), (17, 4), 1, False), ('resize_grid', (9, 4), (15, 4), 1, False)])
def test_shapes_are_accepted(do, ours, source, count, fits):
  assert operations.OPERATIONS[do].fits(ours, source, count) is fits
