"""Retention: which checkpoints of a run are complete, and which of them are kept."""
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from moejax import buckets

# orbax adds this file to a checkpoint when it is whole.
COMMITTED = 'commit_success.txt'


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


def policy(every: int, keep: int, metric: str | None, mode: str) -> dict[str, Any]:
  """Options of orbax's manager: it keeps a checkpoint that any key of config.checkpoint asks for."""
  kept = [policies.LatestN(keep), _LatestRegular(every, keep)]
  score = None
  if metric is not None:
    score = lambda metrics: metrics['score']
    kept.append(policies.BestN(get_metric_fn=score, reverse=mode == 'min', n=1, keep_checkpoints_without_metrics=False))
  return dict(preservation_policy=policies.AnyPreservationPolicy(kept), best_fn=score, best_mode=mode)


def latest_regular(steps: Sequence[int], every: int, keep: int) -> list[int]:
  """The last `keep` of `steps` that are multiples of `every`, in order."""
  return sorted(step for step in steps if step % every == 0)[-keep:]


@dataclasses.dataclass
class _LatestRegular(policies.PreservationPolicy):
  """Keeps the checkpoints that a rollback may need, however often interruptions save others in between."""
  every: int
  keep: int

  def should_preserve(self, checkpoints, *, context):
    del context
    regular = latest_regular([checkpoint.step for checkpoint in checkpoints], self.every, self.keep)
    return [checkpoint.step in regular for checkpoint in checkpoints]
