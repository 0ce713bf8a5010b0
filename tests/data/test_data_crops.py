"""Crops and augmentations: their invariants, worked out by hand on small images."""
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moejax import data
from moejax.data import crops
from moejax.data import augment as augment_lib

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8)


def encoded(array, kind='PNG'):
  file = io.BytesIO()
  Image.fromarray(array).save(file, kind)
  return file.getvalue()


# crops

def test_an_encoded_image_and_its_array_are_the_same_image():
  for crop in ('stretch', 'center'):
    np.testing.assert_array_equal(crops.prepare(encoded(RAMP), 4, 1, crop, None),
                                  crops.prepare(RAMP, 4, 1, crop, None))


def test_the_center_is_the_largest_central_square():
  # Height 6, width 8: columns 1 to 6.
  cut = crops.prepare(RAMP, 6, 1, 'center', None)
  np.testing.assert_allclose(cut[..., 0] * 255, RAMP[:, 1:7], atol=1e-4)
  # Inception evaluates on 7/8 of it: 5.25 pixels from (8 - 5.25) / 2 and (6 - 5.25) / 2.
  assert crops.center_box(8, 6, 'inception') == (1.375, .375, 6.625, 5.625)


def test_stretching_keeps_all_of_the_image():
  halves = np.repeat(np.array([[0, 255]], np.uint8), 10, 0).repeat(4, 1)  # 10 high, 8 wide, left black, right white
  cut = crops.prepare(halves, 4, 1, 'stretch', None)[..., 0]
  assert (cut[:, 0] == 0).all() and (cut[:, 3] == 1).all()


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 1000))
def test_an_inception_crop_is_inside_and_within_its_ranges_of_area_and_ratio(width, height, seed):
  box = crops.inception_box(width, height, np.random.default_rng(seed))
  left, top, right, bottom = box
  slack = 1e-9 * max(width, height)
  assert -slack <= left < right <= width + slack and -slack <= top < bottom <= height + slack
  if box != crops.center_box(width, height, 'center'):
    assert .08 <= (right - left) * (bottom - top) / (width * height) <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


def test_channels_are_converted_or_refused():
  grey = crops.prepare(RAMP[:6, :6], 6, 3, 'stretch', None)
  assert grey.shape == (6, 6, 3) and (grey[..., 0] == grey[..., 2]).all()
  red = encoded(np.full((5, 4, 3), [200, 0, 0], np.uint8))
  # Luma of ITU-R 601: 0.299 of red, 200 * 0.299 = 59.8, rounded by Pillow.
  np.testing.assert_allclose(crops.prepare(red, 4, 1, 'stretch', None) * 255, 60, atol=1e-4)
  with pytest.raises(ValueError, match='an image has 4 channels, and config.data.channels is 3'):
    crops.prepare(np.zeros((4, 4, 4), np.uint8), 4, 3, 'stretch', None)


@pytest.mark.parametrize('raw', [b'', b'not an image', encoded(np.zeros((40, 40), np.uint8), 'JPEG')[:200]])
def test_bytes_that_are_not_a_whole_image_are_refused(raw):
  with pytest.raises(OSError):  # which the pipeline turns into a DataError that names the image
    crops.prepare(raw, 4, 1, 'stretch', None)


# augmentations

def apply(images, *configs, seed=0):
  built = augment_lib.build(configs, 'augment', images.shape[-1])
  return np.asarray(jax.jit(lambda x, key: augment_lib.apply(built, x, key))(images, jax.random.key(seed)))


IMAGES = jnp.tile(jnp.linspace(.1, .9, 48).reshape(1, 4, 4, 3), (64, 1, 1, 1))


def test_a_flip_mirrors_about_half_of_the_images():
  flipped = apply(IMAGES, dict(name='flip'))
  mirrored = np.asarray(IMAGES)[:, :, ::-1]
  changed = [np.array_equal(image, mirror) for image, mirror in zip(flipped, mirrored)]
  kept = [np.array_equal(image, original) for image, original in zip(flipped, np.asarray(IMAGES))]
  assert all(np.logical_xor(changed, kept))
  assert 16 < sum(changed) < 48  # binomial(64, 1/2): 4 standard deviations


def test_a_padded_crop_is_a_shifted_image_with_zeros_from_outside():
  shifted = apply(IMAGES, dict(name='pad_crop', padding=1))
  padded = np.pad(np.asarray(IMAGES[0]), ((1, 1), (1, 1), (0, 0)))
  windows = [padded[y:y + 4, x:x + 4] for y in range(3) for x in range(3)]
  found = [[np.array_equal(image, window) for window in windows].index(True) for image in shifted]
  assert len(set(found)) == 9


def test_brightness_adds_one_offset_within_its_range_to_an_image():
  difference = apply(IMAGES, dict(name='brightness', max_delta=.1)) - np.asarray(IMAGES)
  assert np.ptp(difference, axis=(1, 2, 3)).max() < 1e-6  # float32
  assert -.1 <= difference.min() < -.05 and .05 < difference.max() <= .1 + 1e-6


def test_contrast_scales_deviations_from_the_channel_mean():
  images = .4 + .2 * IMAGES  # so that nothing is clipped at 0 or 1
  centred = lambda x: x - x.mean((1, 2), keepdims=True)
  ratio = centred(apply(images, dict(name='contrast', lower=.5, upper=1.5))) / centred(np.asarray(images))
  assert np.ptp(ratio, axis=(1, 2, 3)).max() < 1e-4  # float32 over small distances
  assert .5 <= ratio.min() < .75 and 1.25 < ratio.max() <= 1.5 + 1e-4


def test_no_saturation_is_grey():
  grey = apply(IMAGES, dict(name='saturation', lower=0., upper=1e-7))
  assert np.ptp(grey, axis=-1).max() < 1e-5  # float32


def test_a_rotation_keeps_the_middle_and_moves_the_rest():
  images = jnp.tile(jnp.linspace(.1, .9, 25).reshape(1, 5, 5, 1), (16, 1, 1, 1))
  turned = apply(images, dict(name='rotate', max_degrees=45.))
  np.testing.assert_allclose(turned[:, 2, 2], images[:, 2, 2], atol=1e-5)  # float32 interpolation
  assert np.abs(turned - np.asarray(images)).max(axis=(1, 2, 3)).min() > 0


def test_a_pipeline_augments_normalized_images_as_the_key_decides():
  config = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=16)
  changes = (dict(name='pad_crop', padding=2), dict(name='brightness', max_delta=.2))
  pipeline = data.build({**config, 'augment': changes})
  batch = next(pipeline.train(0))
  augment = jax.jit(pipeline.augment)
  one, again, other = (augment(batch, jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one['image'], again['image'])
  assert not np.array_equal(one['image'], other['image'])
  np.testing.assert_array_equal(one['label'], batch['label'])
  assert one['image'].dtype == jnp.float32 and one['image'].shape == (16, 8, 8, 1)
  # Pixels were in [0, 1] before `(x - .5) / .5`, and are again.
  assert -1 - 1e-6 <= one['image'].min() and one['image'].max() <= 1 + 1e-6


def test_without_augmentations_nothing_changes():
  pipeline = data.build(dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=4))
  batch = next(pipeline.train(0))
  assert pipeline.augment(batch, jax.random.key(0)) is batch
