"""How many slots an expert has in each group, by the formulas of eleven codebases."""
import fractions
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from moejax.config import ConfigError

Convention = Literal['moejax', 'vmoe', 'flaxformer', 'mesh_tensorflow', 'deepspeed', 'fairseq', 'lingvo', 'tutel',
                     'fastmoe', 'fastmoe_switch', 'widenet']


def _up_to_multiple_of_4(slots: int) -> int:
  return slots + -slots % 4


# convention -> (slots for S tokens, E experts, K choices and a factor; minimum number of slots).
_CONVENTIONS: dict[str, tuple[Callable[[int, int, int, float], int], int]] = {
    # Exact: in floating point, 50 tokens with factor 1.1 and 5 experts would get 12 slots instead of 11.
    'moejax': (lambda s, e, k, f: math.ceil(fractions.Fraction(str(float(f))) * s * k / e), 0),
    'vmoe': (lambda s, e, k, f: _up_to_multiple_of_4(math.ceil(s * k * f / e)), 0),
    'flaxformer': (lambda s, e, k, f: round(f * s / e), 4),
    'mesh_tensorflow': (lambda s, e, k, f: min(s, int(s * f / e)), 4),
    # A product in float32, which rounds: 25 tokens with factor 1.2 and 2 experts get 16 slots instead of 15.
    'deepspeed': (lambda s, e, k, f: math.ceil(np.float32(s / e) * np.float32(f * k)), 4),
    'fairseq': (lambda s, e, k, f: int(k * f * math.ceil(s / e)), 0),
    'lingvo': (lambda s, e, k, f: _up_to_multiple_of_4(int(s * f / e)), 0),
    'tutel': (lambda s, e, k, f: k * int(f * math.ceil(s / e)), 0),
    'fastmoe': (lambda s, e, k, f: math.ceil(f * s) * k // e, 0),
    'fastmoe_switch': (lambda s, e, k, f: math.ceil(f * s / e), 0),
    'widenet': (lambda s, e, k, f: int(s * f * k // e) - 1, 0),
}


def capacity(tokens: int, num_experts: int, k: int, factor: float, convention: Convention = 'moejax',
             minimum: int | None = None) -> int:
  """Slots of an expert in a group, by a codebase's formula.

      moejax            ceil(factor*S*K/E)
      vmoe              ceil(S*K*factor/E), up to a multiple of 4
      flaxformer        max(round(factor*S/E), 4)                   ignores K
      mesh_tensorflow   max(min(S, int(S*factor/E)), 4)             ignores K
      deepspeed         max(ceil(S/E*(factor*K)), 4)                a product in float32
      fairseq           int(K*factor*ceil(S/E))
      lingvo            int(S*factor/E), up to a multiple of 4      ignores K
      tutel             K*int(factor*ceil(S/E))
      fastmoe           floor(ceil(factor*S)*K/E)                   its GShard gate
      fastmoe_switch    ceil(factor*S/E)                            its Switch gate, K = 1, in float64
      widenet           floor(S*K*factor/E) - 1                     as released

  Args:
    tokens: S.
    num_experts: E.
    k: K, experts per token.
    factor: capacity factor, a multiple of the equal share.
    convention: one of the above.
    minimum: replaces the formula's minimum of 4 or 0.
  """
  formula, least = _CONVENTIONS[convention]
  return max(formula(tokens, num_experts, k, factor), least if minimum is None else minimum)


def checked_slots(slots: int, tokens: int, factor: float, key: str) -> int:
  """min(`slots`, `tokens`): an expert cannot get more. `key`: the config key of `factor`.

  Raises:
    ConfigError: there are no slots.
  """
  if slots < 1:
    raise ConfigError(f'.{key} = {factor} drops every token: in a group of {tokens} tokens every expert gets {slots} '
                      'slots. Raise the factor, set a min_capacity, or make the groups larger.')
  return min(slots, tokens)


def slots_that_choose(tokens: int, num_experts: int, factor: float, key: str,
                      convention: Convention = 'moejax') -> int:
  """C for expert choice, with `factor` experts per token on average: `capacity` for K = 1, after `checked_slots`."""
  return checked_slots(capacity(tokens, num_experts, 1, factor, convention), tokens, factor, key)
