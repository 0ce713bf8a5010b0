"""What balancers require of the router they belong to."""
from moejax.config import ConfigError


def choosing(k: int | None) -> int:
  """Returns `k`; raises ConfigError if it is None."""
  if k is None:
    raise ConfigError(' requires token choice with a fixed number of experts; this selection needs no '
                      'balancing. Remove it.')
  return k


def choosing_by_noise(noisy: bool, k: int | None) -> int:
  """Returns `k`; raises ConfigError unless routing is token choice by noisy scores."""
  k = choosing(k)
  if not noisy:
    raise ConfigError(": without noise the load loss has no gradient. Use score 'noisy_linear'.")
  return k
