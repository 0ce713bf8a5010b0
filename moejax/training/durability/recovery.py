"""config.recovery: what a run does about bad batches, late batches and collapsed routers."""
import dataclasses
from typing import Annotated, Literal

from moejax.ranges import Above, AtMost, Count, Natural, Positive


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
  """config.recovery.

  Attributes:
    skip: batches whose update is not applied: 'not_finite' (loss or gradient), or 'spikes' as well.
    spike: a loss (or logarithm of the gradient norm) this many standard deviations above its running median is a spike.
    patience: number of skipped batches in a row after which the run rolls back to the last good checkpoint.
    max_rollbacks: maximum number of rollbacks; the run stops when another is due.
    slow_data: seconds to wait for a batch before a warning.
    data_timeout: seconds to wait for a batch before the run saves and stops.
    collapse: share of the tokens that choose the same expert from which a router counts as collapsed.
  """
  skip: Literal['not_finite', 'spikes'] = 'not_finite'
  spike: Positive = 10.0
  patience: Count = 10
  max_rollbacks: Natural = 3
  slow_data: Positive = 30.0
  data_timeout: Positive = 600.0
  collapse: Annotated[float, Above(0), AtMost(1)] = 0.9
