"""Reads checkpoints: which step is meant, which is the latest that can be read, and whether it is what was saved."""
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from moejax import buckets
from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.training import metrics as metrics_lib
from moejax.training import workdir as workdir_lib
from moejax.training.durability import checksums, fingerprints, orbax_logs, retention
from moejax.training.durability.stop_reasons import NoCheckpoint


def find_step(workdir: str | Path, step: int | str) -> int | None:
  """The step that 'last' (None: the latest readable one), 'best' by config.checkpoint.metric, or an int names.

  Raises:
    ConfigError: it is none of these, or the best is not known.
  """
  if step == 'last':
    return None
  if step != 'best':
    if not str(step).isdigit():
      raise ConfigError(f"step must be an int, 'last' or 'best', not {step!r}.")
    return int(step)
  config: Any = workdir_lib.load_config(workdir)
  options = config.checkpoint
  steps = retention.complete(workdir)
  scores = {row['step']: row[options.metric] for row in metrics_lib.read(workdir)
            if row['step'] in steps and row.get(options.metric) is not None}
  if not scores:
    raise ConfigError(f'Cannot determine the best checkpoint of {workdir}: config.checkpoint.metric is '
                      f"{options.metric!r}, and no checkpoint has a value for it. Take the 'last' or one of the steps: "
                      f'{", ".join(map(str, sorted(steps))) or "there are none"}.')
  return (max if options.mode == 'max' else min)(scores, key=lambda step: scores[step])


def restore_for_evaluation(workdir: str | Path, step: int | None = None,
                           arrays: bool = True) -> tuple[ConfigDict, int, Tree, Tree]:
  """(config, step, params, router state) from a checkpoint alone; `params` is the moving average where one was kept.

  The latest readable checkpoint, or the one of `step`. Arrays are numpy's, on no device yet. Without `arrays` only
  their shapes are read, as `jax.ShapeDtypeStruct`s.

  Raises:
    NoCheckpoint: there is no checkpoint, or none can be read; with `step`, that one.
  """
  orbax_logs.silence()
  folder, steps = retention.folder(workdir), retention.complete(workdir)
  if step is not None:
    if step not in steps:
      raise NoCheckpoint(f'{folder} has no checkpoint of step {step}; there are {sorted(steps)}.')
  elif not steps:
    raise NoCheckpoint(f'{folder} has no checkpoints: train first, with python -m moejax.train.')

  def read(step):
    checksums.check(folder / str(step), 'about/')
    try:
      return read_items(step)
    except Exception:
      checksums.check(folder / str(step))
      raise

  def read_items(step):
    about = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / str(step) / 'about')
    def item(name):
      if name in about['fingerprints'] and not arrays:
        return _shapes(folder / str(step) / name)
      tree = _restore_to_host(folder / str(step) / name) if name in about['fingerprints'] else {}
      if arrays:
        verify(name, tree, about)
      return tree
    params = item('average' if 'average' in about['fingerprints'] else 'params')
    return workdir_lib.loads(about['config']), about['step'], params, item('router_state')

  if step is not None:
    try:
      return read(step)
    except Exception as error:
      raise NoCheckpoint(f'The checkpoint {folder / str(step)} cannot be read ({_reason(error)}).') from error
  _, restored, _ = first_readable(steps, read, folder, print)
  return restored


def _restore_to_host(path: Path) -> Tree:
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return jax.tree.map(np.asarray, checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))


def _shapes(path: Path) -> Tree:
  with ocp.PyTreeCheckpointer() as checkpointer:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                        checkpointer.metadata(path).item_metadata.tree)


def first_readable(steps: Iterable[int], read: Callable[[int], Any], folder: Path,
                   say: Callable[[str], None]) -> tuple[int | None, Any, list[int]]:
  """(step, `read(step)`, damaged steps) for the first of `steps` that can be read; Nones without `steps`."""
  damaged = []
  for step in steps:
    try:
      found = read(step)
    except Exception as error:  # damage can raise any error, and so can the way to a bucket
      if buckets.is_address(folder) and not isinstance(error, checksums.Damaged):
        raise NoCheckpoint(f'The checkpoint {folder / str(step)} cannot be read, and is not damaged '
                           f'({_reason(error)}). Run the same command again.') from error
      damaged.append((step, _reason(error)))
      continue
    for bad, reason in damaged:
      say(f'The checkpoint {folder / str(bad)} is damaged ({reason}): using the one of step {step} instead.')
    return step, found, [bad for bad, _ in damaged]
  if damaged:
    raise NoCheckpoint(f'No checkpoint in {folder} can be read; reading the latest raised {damaged[0][1]}. Restore the '
                       'folder from a backup, or delete it to start again from step 0.')
  return None, None, []


def verify(name: str, tree: Any, about: dict) -> None:
  """Raises `Damaged` if the item `name` of a checkpoint is not what its `about` says."""
  if fingerprints.fingerprint(tree) != about['fingerprints'].get(name, []):
    raise checksums.Damaged(f'{name} differs from what was saved')


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.splitlines()[0][:200]
