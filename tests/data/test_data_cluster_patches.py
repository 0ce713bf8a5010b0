"""Data in clusters: the role of each patch, recovered from the patches; digits and their quarter turns."""
import numpy as np

from moejax import data
from moejax.data.cluster_patches import cluster_patches


def test_every_example_has_a_feature_a_centre_a_decoy_and_noise():
  generator = np.random.default_rng(0)
  basis = np.linalg.qr(generator.normal(size=(50, 50)))[0][:8]
  patches, label, cluster = cluster_patches(500, basis, generator, noise=1., decoy=3.)
  coordinates = patches.astype(np.float64) @ basis.T  # along v_1..v_4, c_1..c_4
  for example, (y, k) in enumerate(zip(label, cluster)):
    lengths = np.linalg.norm(patches[example], axis=1)
    inside = np.linalg.norm(coordinates[example], axis=1)
    # Three patches lie along one vector of the basis; the noise does not.
    pure = np.isclose(lengths, inside, rtol=1e-4)
    assert pure.sum() == 3
    amounts = {int(np.abs(c).argmax()): c[np.abs(c).argmax()] for c in coordinates[example][pure]}
    (centre,) = [c for c in amounts if c >= 4]
    assert centre == 4 + k and 10 <= amounts[centre] <= 20
    assert 5 <= amounts[k] * (2 * y - 1) <= 20
    (decoy,) = [c for c in amounts if c not in (centre, k)]
    assert decoy < 4 and 5 <= abs(amounts[decoy]) <= 30
  noise = np.concatenate([p[~np.isclose(np.linalg.norm(p, axis=1), np.linalg.norm(c, axis=1), rtol=1e-4)]
                          for p, c in zip(patches, coordinates)])
  assert noise.std() == np.clip(noise.std(), 10 / 50**.5 * .97, 10 / 50**.5 * 1.03)  # 25,000 draws
  # Balanced: 500 draws, four standard errors.
  np.testing.assert_allclose(np.bincount(label) / 500, 1 / 2, atol=0.09)
  np.testing.assert_allclose(np.bincount(cluster) / 500, 1 / 4, atol=0.08)


def test_patch_positions_carry_no_information():
  generator = np.random.default_rng(0)
  basis = np.eye(50)[:8]
  patches, _, _ = cluster_patches(4000, basis, generator)
  centre = np.abs(patches[..., 4:8]).max(-1).argmax(-1)
  np.testing.assert_allclose(np.bincount(centre) / 4000, 1 / 4, atol=0.03)


def test_rotated_digits_are_the_digits_and_their_quarter_turns():
  config = dict(name='images', image_size=8, channels=1, batch_size=4)
  digits = data.build(config | dict(source=dict(name='digits'))).source.open('test')
  source = data.build(config | dict(source=dict(name='rotated_digits'))).source
  rotated, count = source.open('test'), len(digits)
  assert len(rotated) == 2 * count and source.num_classes == 2
  for index in (0, 17, count - 1):
    upright, turned = rotated[index], rotated[count + index]
    np.testing.assert_array_equal(upright['image'], digits[index]['image'])
    # Row i of the image turned counterclockwise is column W-1-i of the upright one.
    for i in range(8):
      np.testing.assert_array_equal(turned['image'][i], digits[index]['image'][:, 7 - i])
    assert (upright['label'], turned['label']) == (0, 1)
    assert source.routing('test')[index] == source.routing('test')[count + index] == digits[index]['label']
