"""What balancers require of the router they belong to."""
from moejax.config import ConfigError


def choosing(k: int | None, where: str) -> int:
  """Returns `k`; raises ConfigError if it is None. `where`: config path of the balancer."""
  if k is None:
    raise ConfigError(f'{where} requires token choice with a fixed number of experts; this selection needs no '
                      'balancing. Remove it.')
  return k


def check_noise(noisy: bool, k: int | None, where: str):
  """Raises ConfigError unless routing is token choice by noisy scores."""
  choosing(k, where)
  if not noisy:
    raise ConfigError(f"{where}: without noise the load loss has no gradient. Use score 'noisy_linear'.")
