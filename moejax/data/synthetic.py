"""Synthetic data with known best routing: fitting it requires telling hidden components apart."""
import dataclasses
import functools

import numpy as np

from moejax.config import ConfigError, config_path
from moejax.data.source import SOURCES, Arrays, Source
from moejax.ranges import Count, Natural, Positive

_SPLIT_STREAM = {'train': 1, 'test': 2}


@SOURCES('clusters')
@dataclasses.dataclass(frozen=True)
class Clusters(Source):
  """Images of patches from hidden clusters; each cluster has its own linear map to the class scores.

  In an orthonormal basis of patch space, the first `num_clusters` coordinates of a patch are the one-hot of its
  cluster z, the next `task_dim` are uniform noise u, the rest zero. The label is `argmax_c sum_patches (A_z u)_c`. One
  linear expert per cluster, routed by z, and a mean over patches solve the task exactly; `routing` returns z.

  Config keys:
    image_size: height and width of an image.
    patch_size: height and width of a patch.
    channels: channels of an image.
    num_clusters: number of hidden clusters.
    task_dim: number of coordinates of a patch that the label depends on.
    num_classes: number of labels.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  image_size: Count = 16
  patch_size: Count = 4
  channels: Count = 1
  num_clusters: Count = 8
  task_dim: Count = 8
  num_classes: Count = 10
  train_examples: Count = 4096
  test_examples: Count = 1024
  data_seed: Natural = 0

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ConfigError(f'.image_size must be a multiple of patch_size {self.patch_size}, not '
                        f'{self.image_size}.')
    if self.num_clusters + self.task_dim > self.patch_dim:
      raise ConfigError(f': num_clusters + task_dim = {self.num_clusters + self.task_dim} exceeds the '
                        f'{self.patch_dim} values of a patch. Choose fewer, or a larger patch_size.')

  @property
  def patch_dim(self) -> int:
    return self.patch_size ** 2 * self.channels

  def open(self, split):
    self.check_split(split)
    cluster, noise = self._hidden(split)
    basis, maps = self.task
    coordinates = np.concatenate([np.eye(self.num_clusters)[cluster], noise], -1)
    patches = coordinates @ basis[:coordinates.shape[-1]]
    # |patch| <= sqrt(1 + task_dim), so pixels stay in [0, 1]; 0.5 is grey.
    patches = .5 + patches / (2 * np.sqrt(1 + self.task_dim))
    side, size = self.image_size // self.patch_size, self.patch_size
    images = patches.reshape(-1, side, side, size, size, self.channels).swapaxes(2, 3)
    images = images.reshape(-1, self.image_size, self.image_size, self.channels)
    scores = np.einsum('npcd,npd->nc', maps[cluster], noise)
    return Arrays(image=images.astype(np.float32), label=scores.argmax(-1).astype(np.int32))

  def routing(self, split: str) -> np.ndarray:
    """<int>[N,P]: the cluster of every patch; examples in order, patches row by row."""
    return self._hidden(split)[0]

  @functools.cached_property
  def task(self) -> tuple[np.ndarray, np.ndarray]:
    """The basis of patch space, one vector per row, and the maps [num_clusters, num_classes, task_dim]."""
    rng = np.random.default_rng(self.data_seed)
    basis, _ = np.linalg.qr(rng.normal(size=(self.patch_dim, self.patch_dim)))
    return basis.T, rng.normal(size=(self.num_clusters, self.num_classes, self.task_dim))

  def _hidden(self, split):
    rng = np.random.default_rng((self.data_seed, _SPLIT_STREAM[split]))
    count = {'train': self.train_examples, 'test': self.test_examples}[split]
    shape = (count, (self.image_size // self.patch_size) ** 2)
    return rng.integers(self.num_clusters, size=shape), rng.uniform(-1, 1, shape + (self.task_dim,))


@SOURCES('markov_mixture')
@dataclasses.dataclass(frozen=True)
class MarkovMixture(Source):
  """Documents of ids, each from one of `num_components` Markov chains, drawn uniformly and started in equilibrium.

  The best routing is by component (`routing`), which the first tokens of a document reveal. The attainable loss is
  known exactly: `component_bits` if the component is known, `bigram_bits` without telling components apart, and
  `optimal_bits` of given documents, which no model beats on average. Use the tokenizer `ids`.

  Config keys:
    num_components: number of chains.
    num_ids: number of ids.
    document_length: ids per document.
    concentration: of the Dirichlet distribution of transitions; smaller values make them easier to predict.
    train_documents, test_documents: number of documents in each split.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  num_components: Count = 4
  num_ids: Count = 16
  document_length: Count = 256
  concentration: Positive = 0.2
  train_documents: Count = 4096
  test_documents: Count = 512
  data_seed: Natural = 0

  def open(self, split):
    self.check_split(split)
    component, uniform = self._hidden(split)
    cumulative = np.cumsum(self.transitions, -1)
    start = np.cumsum(self.stationary, -1)
    tokens = np.empty((len(component), self.document_length), np.int32)
    state = _draw(start[component], uniform[:, 0])
    for position in range(self.document_length):
      if position:
        state = _draw(cumulative[component, state], uniform[:, position])
      tokens[:, position] = state
    return Arrays(tokens=tokens)

  def routing(self, split: str) -> np.ndarray:
    """<int>[N]: the component of every document."""
    return self._hidden(split)[0]

  @functools.cached_property
  def transitions(self) -> np.ndarray:
    """[num_components, num_ids, num_ids]: probabilities of the next id; rows are Dirichlet distributed."""
    rng = np.random.default_rng(self.data_seed)
    rows = rng.dirichlet(np.full(self.num_ids, self.concentration), (self.num_components, self.num_ids))
    # Some uniform distribution makes every chain irreducible and aperiodic, so its equilibrium is unique.
    return .99 * rows + .01 / self.num_ids

  @functools.cached_property
  def stationary(self) -> np.ndarray:
    """[num_components, num_ids]: the distribution p = p P of each chain: the solution of (P' - I; 1) p = (0; 1)."""
    size = self.num_ids
    solutions = []
    for chain in self.transitions:
      equations = np.concatenate([chain.T - np.eye(size), np.ones((1, size))])
      solutions.append(np.linalg.lstsq(equations, np.r_[np.zeros(size), 1], rcond=None)[0])
    return np.stack(solutions)

  @property
  def component_bits(self) -> float:
    """Bits per token, given the previous token and the component: the mean entropy rate of the chains."""
    rate = -(self.transitions * np.log2(self.transitions)).sum(-1)
    return float((self.stationary * rate).sum(-1).mean())

  @property
  def bigram_bits(self) -> float:
    """Bits per token, given only the previous token: the best of a model that cannot tell components apart."""
    pairs = (self.stationary[..., None] * self.transitions).mean(0)
    return float(-(pairs * np.log2(pairs / pairs.sum(-1, keepdims=True))).sum())

  def optimal_bits(self, tokens: np.ndarray) -> np.ndarray:
    """[N]: bits of each document under the true mixture; `tokens: <int>[N,n]`."""
    first = np.log2(self.stationary[:, tokens[:, 0]])
    steps = np.log2(self.transitions[:, tokens[:, :-1], tokens[:, 1:]]).sum(-1)
    return -(np.logaddexp2.reduce(first + steps, axis=0) - np.log2(self.num_components))

  def _hidden(self, split):
    rng = np.random.default_rng((self.data_seed, _SPLIT_STREAM[split]))
    count = {'train': self.train_documents, 'test': self.test_documents}[split]
    return rng.integers(self.num_components, size=count), rng.random((count, self.document_length))


def _draw(cumulative, uniform):
  # The last entry may be rounded to just below 1.
  return np.minimum((uniform[:, None] >= cumulative).sum(-1), cumulative.shape[-1] - 1)
