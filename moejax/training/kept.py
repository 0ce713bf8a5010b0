"""Retention: when checkpoints are written, and which are kept."""
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from orbax.checkpoint import checkpoint_managers as policies

from moejax import buckets
from moejax.ranges import Count

# orbax adds this file to a checkpoint when it is whole.
COMMITTED = 'commit_success.txt'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """config.checkpoint.

  Attributes:
    every: steps between checkpoints; the last step, and any step at which the run is interrupted, has one as well.
    keep: number of latest checkpoints that are kept, and of latest regular ones (at multiples of `every`).
    metric: e.g. 'eval/test/accuracy': the checkpoint with its best value is kept as well; None: only the latest.
    mode: whether the best is the largest or the smallest.
  """
  every: Count = 500
  keep: Count = 2
  metric: str | None = None
  mode: Literal['max', 'min'] = 'max'


def folder(workdir: str | Path) -> Path:
  """The folder of the checkpoints of a run."""
  path = buckets.path(workdir)
  return (path if buckets.is_address(path) else path.absolute()) / 'checkpoints'


def complete(workdir: str | Path) -> list[int]:
  """Steps of the complete checkpoints in the folder of a run, latest first."""
  found = [path for path in folder(workdir).glob('*') if path.name.isdigit()]
  if buckets.is_address(workdir):  # where they are written under their final names
    found = [path for path in found if (path / COMMITTED).exists()]
  return sorted((int(path.name) for path in found), reverse=True)


def policy(options: CheckpointConfig) -> dict[str, Any]:
  """Retention options of orbax's manager: it keeps a checkpoint that any key of `CheckpointConfig` asks for."""
  keep = [policies.LatestN(options.keep), _LatestRegular(options)]
  score = None
  if options.metric is not None:
    score = lambda metrics: metrics['score']
    keep.append(policies.BestN(get_metric_fn=score, reverse=options.mode == 'min', n=1,
                               keep_checkpoints_without_metrics=False))
  return dict(preservation_policy=policies.AnyPreservationPolicy(keep), best_fn=score, best_mode=options.mode)


def latest_regular(steps: Sequence[int], options: CheckpointConfig) -> list[int]:
  """The last `options.keep` of `steps` that are multiples of `options.every`, in order."""
  return sorted(step for step in steps if step % options.every == 0)[-options.keep:]


@dataclasses.dataclass
class _LatestRegular(policies.PreservationPolicy):
  """Keeps the checkpoints that a rollback may need, however often interruptions save others in between."""
  options: CheckpointConfig

  def should_preserve(self, checkpoints, *, context):
    del context
    regular = latest_regular([checkpoint.step for checkpoint in checkpoints], self.options)
    return [checkpoint.step in regular for checkpoint in checkpoints]
