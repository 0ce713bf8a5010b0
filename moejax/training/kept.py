"""When checkpoints are written, and which of them are kept."""
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from orbax.checkpoint import checkpoint_managers as policies

from moejax.ranges import Count


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """config.checkpoint.

  Attributes:
    every: steps between checkpoints; the last step always has one, and so has one at which the run is interrupted.
    keep: how many of the latest are kept, also of those that `every` asked for.
    metric: e.g. 'eval/test/accuracy': the checkpoint where it was best is kept as well; None: only the latest.
    mode: whether the best is the largest or the smallest.
  """
  every: Count = 500
  keep: Count = 2
  metric: str | None = None
  mode: Literal['max', 'min'] = 'max'


def complete(workdir: str | Path) -> list[int]:
  """Steps of the complete checkpoints in the folder of a run, the last one first."""
  names = (path.name for path in (Path(workdir) / 'checkpoints').glob('*'))
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def policy(options: CheckpointConfig) -> dict[str, Any]:
  """Options of orbax's manager: what is kept is any that one of the reasons in `CheckpointConfig` asks for."""
  keep = [policies.LatestN(options.keep), _LatestRegular(options)]
  score = None
  if options.metric is not None:
    score = lambda metrics: metrics['score']
    keep.append(policies.BestN(get_metric_fn=score, reverse=options.mode == 'min', n=1,
                               keep_checkpoints_without_metrics=False))
  return dict(preservation_policy=policies.AnyPreservationPolicy(keep), best_fn=score, best_mode=options.mode)


def latest_regular(steps: Sequence[int], options: CheckpointConfig) -> list[int]:
  """Of `steps` the last ones that `every` asked for, in order."""
  return sorted(step for step in steps if step % options.every == 0)[-options.keep:]


@dataclasses.dataclass
class _LatestRegular(policies.PreservationPolicy):
  """Keeps what a rollback may need, however often the run is interrupted, and saved, in between."""
  options: CheckpointConfig

  def should_preserve(self, checkpoints, *, context):
    del context
    regular = latest_regular([checkpoint.step for checkpoint in checkpoints], self.options)
    return [checkpoint.step in regular for checkpoint in checkpoints]
