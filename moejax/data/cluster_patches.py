"""Two classes in hidden clusters: the data of "Towards Understanding MoE" (2208.02813), synthetic and real."""
import dataclasses

import numpy as np

from moejax.data.image_files import Digits
from moejax.data.source import SOURCES, Arrays


def cluster_patches(count: int, basis: np.ndarray, generator: np.random.Generator, noise: float = 1.,
                    decoy: float = 3.) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Examples of four patches in random order, as in uclaml/MoE (ten times the scale of section 3 of the paper).

  An example of cluster k with label y = -1 or 1 has a patch `a y v_k` that reveals its label, a in [0.5, 2], one
  `b c_k` that reveals its cluster, b in [1, 2], one `g e v_j` of another cluster's feature, j != k, e = -1 or 1,
  g in [0.5, decoy], and one of Gaussian noise with variance noise^2 / D per coordinate. The four settings of the paper
  have (noise, decoy) of (1, 3), (2, 3), (1, 2) and (2, 2).

  Args:
    count: N.
    basis: <float>[2K,D] orthonormal; features v_1..v_K, then centres c_1..c_K.
    generator: source of randomness.
    noise: see above.
    decoy: see above.

  Returns:
    patches <float32>[N,4,D], label <int32>[N] (0 for y = -1), cluster <int>[N].
  """
  features, centres = np.split(basis, 2)
  clusters, dim = features.shape
  cluster = generator.integers(clusters, size=count)
  other = (cluster + generator.integers(1, clusters, size=count)) % clusters
  label, sign = generator.integers(2, size=(2, count))
  uniform = lambda low, high: generator.uniform(low, high, (count, 1))
  patches = np.stack([
      uniform(.5, 2) * (2 * label - 1)[:, None] * features[cluster],
      uniform(1, 2) * centres[cluster],
      uniform(.5, decoy) * (2 * sign - 1)[:, None] * features[other],
      generator.normal(0, noise / np.sqrt(dim), (count, dim))], axis=1)
  order = np.argsort(generator.random((count, 4)), axis=1)
  patches = 10 * np.take_along_axis(patches, order[..., None], axis=1)
  return patches.astype(np.float32), label.astype(np.int32), cluster


@SOURCES('rotated_digits')
@dataclasses.dataclass(frozen=True)
class RotatedDigits(Digits):
  """Every image of the source 'digits' twice: upright with label 0, and rotated by 90 degrees with label 1.

  The digit is the hidden cluster (`routing`) and not part of the examples. The image experiment of uclaml/MoE does this
  to CIFAR-10 with 30 degrees; a quarter turn needs no interpolation, which would give the rotated images away.
  """
  num_classes = 2

  def open(self, split):
    images = super().open(split).rows(slice(None))['image']
    turned = np.rot90(images, axes=(1, 2))
    return Arrays(image=np.concatenate([images, turned]), label=np.repeat(np.arange(2, dtype=np.int32), len(images)))

  def routing(self, split: str) -> np.ndarray:
    """<int>[N] the digit of every image."""
    return np.tile(super().open(split).rows(slice(None))['label'], 2)
