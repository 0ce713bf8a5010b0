"""Where values stop being finite: found after injecting them, one place at a time."""
import numpy as np
import pytest

from moejax.training.durability.diagnosis import first_not_finite

FINE = {'train/loss': 1., 'train/grad_norm': 1., 'router/block_01/load': np.ones(4),
        'router/block_03/load': np.ones(4), 'router/block_03/z_loss': 1., 'gradient_norm/blocks/1/moe': 1.,
        'gradient_norm/blocks/3/moe': 1., 'gradient_norm/head': 1.}
BATCH = {'image': np.ones((4, 2), np.float32), 'label': np.arange(4)}
NAN = float('nan')


@pytest.mark.parametrize('bad, place', [
    # A bad router spoils all that follow, and every gradient: the first is named.
    ({'router/block_01/load': np.array([1, NAN, 1, 1]), 'router/block_03/load': np.full(4, NAN),
      'gradient_norm/head': NAN}, 'First layer that is not finite: block_01'),
    ({'router/block_03/z_loss': np.inf}, "First layer that is not finite: block_03 (its router's z_loss)"),
    ({'gradient_norm/blocks/1/moe': NAN}, 'gradients are not finite in 1 of 3 modules: blocks/1/moe'),
    ({'gradient_norm/blocks/1/moe': NAN, 'gradient_norm/blocks/3/moe': NAN, 'gradient_norm/head': NAN},
     'check what follows the last router'),
    ({'train/grad_norm': np.inf}, 'their norm overflows'),
])
def test_the_first_non_finite_place_is_named(bad, place):
  assert place in first_not_finite({**FINE, **bad}, BATCH)


def test_a_non_finite_batch_is_named_before_all_else():
  image = BATCH['image'].copy()
  image[[1, 3], 0] = np.inf
  place = first_not_finite({**FINE, 'router/block_01/load': np.full(4, NAN)}, {**BATCH, 'image': image})
  assert place == "The batch itself is not finite: 'image', examples [1, 3]."


@pytest.mark.parametrize('bad, sentence', [
    ({'train/loss': NAN, 'train/router_loss': NAN, 'train/cross_entropy': 2.},
     'Every router and every gradient is finite; only the loss is not: train/router_loss.'),
    ({'train/loss': np.inf, 'train/cross_entropy': np.inf, 'train/router_loss': 0.},
     'Every router and every gradient is finite; only the loss is not: train/cross_entropy.'),
    ({'train/loss': NAN}, 'Every router and every gradient is finite; only the loss is not.'),
    ({'train/grad_norm': np.inf}, 'Every single gradient is finite, but their norm overflows.'),
    ({'train/loss': NAN, 'train/grad_norm': np.inf},
     'Every single gradient is finite, but their norm overflows.')])
def test_a_non_finite_loss_alone_is_not_blamed_on_the_gradients(bad, sentence):
  assert first_not_finite({**FINE, **bad}, BATCH) == sentence
