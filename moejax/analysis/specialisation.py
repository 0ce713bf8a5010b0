"""What experts specialise in: tables of labels by experts, and their mutual information."""
import numpy as np


def shares(weight: np.ndarray) -> np.ndarray:
  """<float>[...,E] with each token's weights scaled to sum to 1; all zero if no expert computed the token."""
  total = weight.sum(-1, keepdims=True)
  return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)


def membership(labels: np.ndarray, num_labels: int) -> np.ndarray:
  """<float>[N,num_labels] one-hot of `labels: <int>[N]`."""
  return np.eye(num_labels)[labels]


def table(members: np.ndarray, share: np.ndarray) -> np.ndarray:
  """<float>[C,E]: the total share of label c that went to expert e.

  Args:
    members: <float>[N,C]: the degree to which example (or token) n has label c.
    share: <float>[N,E]: the share of it that went to expert e.
  """
  return members.T @ share


def lift(counts: np.ndarray) -> np.ndarray:
  """<float>[C,E]: the share of label c that goes to e, over the share of all labels that does. 1: no preference.

  nan if the label or the expert never occurs.
  """
  expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / max(counts.sum(), 1e-30)
  return np.divide(counts, expected, out=np.full_like(counts, np.nan), where=expected > 0)


def normalised_mutual_information(counts: np.ndarray) -> float:
  """Mutual information of label and expert over their mean entropy: 0 independent, 1 each determines the other.

  `counts: <float>[C,E]` may be fractional. 0 if either has a single value.
  """
  joint = counts / max(counts.sum(), 1e-30)
  label, expert = _entropy(joint.sum(1)), _entropy(joint.sum(0))
  if label + expert == 0:
    return 0.
  return float(max(2 * (label + expert - _entropy(joint.ravel())) / (label + expert), 0.))


def chance_level(members: np.ndarray, share: np.ndarray, shuffles: int = 20, seed: int = 0) -> float:
  """The largest normalised mutual information in `shuffles` random pairings of labels and experts.

  A few examples share information by accident; a measurement is significant if it is clearly above this.
  """
  rng = np.random.default_rng(seed)
  return max(normalised_mutual_information(table(members[rng.permutation(len(members))], share))
             for _ in range(shuffles))


def most_telling(tables: list[np.ndarray], count: int) -> np.ndarray:
  """The sorted indices of the `count` labels most informative about the expert, summed over `tables: [C,E]`."""
  def contribution(counts):
    joint = counts / max(counts.sum(), 1e-30)
    ratio = lift(counts)
    return np.where(joint > 0, joint * np.log(np.where(joint > 0, ratio, 1.)), 0.).sum(1)
  return np.sort(np.argsort(-sum(map(contribution, tables)), kind='stable')[:count])


def _entropy(p: np.ndarray) -> float:
  p = p[p > 0]
  return float(-(p * np.log(p)).sum())
