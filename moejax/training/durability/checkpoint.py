"""Checkpoints: written in the background, whole or not at all; verified when read; kept while among the latest or best.

    checkpoints/<step>/params  router_state  opt_state  skips  average  about  checksums.json

Arrays are stored by their logical names and unsharded shapes, so that any mesh restores them, over any number of
processes. `about` holds the config, the position in the data, and a fingerprint of every item. It is verified before it
is read, and the items against it: a checkpoint that differs from what was written is not used. All processes of a run
call the same methods at the same steps.
"""
import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from moejax import buckets
from moejax.parallel import processes
from moejax.ranges import Count
from moejax.training import workdir as workdir_lib
from moejax.training.durability import checksums, fingerprints, lost_process, orbax_logs, retention
from moejax.training.durability.restore import first_readable, verify
from moejax.training.durability.stop_reasons import NoCheckpoint
from moejax.training.step import TrainState

_ITEMS = ('params', 'router_state', 'opt_state', 'skips', 'average')


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


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: of the run.
    config: the whole config, stored in each checkpoint.
    options: config.checkpoint.
    say: receives messages for the user.
    data: `Pipeline.fingerprint()`; changes in it are reported when the run resumes.
  """

  def __init__(self, workdir: str | Path, config: ConfigDict, options: CheckpointConfig, say: Callable[[str], None],
               data: Mapping[str, str]):
    self.folder = retention.folder(workdir)
    self._in_bucket = buckets.is_address(self.folder)
    self._config, self._options, self._say, self._data = config, options, say, dict(data)
    self._saving: int | None = None
    orbax_logs.silence()
    self._set_damaged_scores_aside()
    self._open()

  def _open(self):
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        **retention.policy(**dataclasses.asdict(self._options)),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)))

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is not None and issubclass(kind, lost_process.ProcessLost):
      return  # Saving needs all processes.
    self.wait()
    self._manager.close()

  def save(self, state: TrainState, iterator: Any, row: dict[str, Any]) -> None:
    """Starts to save the state after step `state.step`; `row` holds the metrics of that step.

    Training continues while the files are written. A save that fails is reported, and leaves earlier checkpoints as
    they were.
    """
    self.wait()
    self._look_for_folder()
    step, items = int(state.step), _items(state)
    if step in self._manager.all_steps():
      return
    about = {'step': step, 'config': workdir_lib.dumps(self._config), 'data': processes.union(iterator.get_state()),
             'source': self._data,
             'fingerprints': {name: fingerprints.fingerprint(tree) for name, tree in items.items()}}
    score = {'score': row[self._options.metric]} if self._options.metric in row else None
    args = ocp.args.Composite(
        about=ocp.args.JsonSave(about), **{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
    self._saving = step
    try:
      with processes.together('begin to save'):
        self._manager.save(step, args=args, metrics=score, force=True)
    except Exception as error:  # noqa: BLE001  (whatever the file system and its library raise)
      self._failed(error)

  def wait(self) -> None:
    """Waits until the pending save has finished or failed."""
    try:
      with processes.together('save'):
        self._manager.wait_until_finished()
    except Exception as error:  # noqa: BLE001
      self._failed(error)

  def _failed(self, error: Exception) -> None:
    lost_process.check(error)
    # The manager keeps the error of its thread forever: a new one starts clean. Half-written files are removed.
    for partial in () if self._in_bucket else self.folder.glob('*orbax-checkpoint-tmp*'):
      shutil.rmtree(partial, ignore_errors=True)
    self._open()
    reason = 'the disk is full' if 'No space left' in str(error) else str(error).splitlines()[0][:300]
    self._say(f'The checkpoint of step {self._saving} could not be written: {reason}. {self.last_good()} Training '
              'continues; the next checkpoint is written as scheduled.')

  def last_good(self) -> str:
    """A sentence that says where the latest complete checkpoint is."""
    self.wait()
    step = self.latest_step()
    return 'There is no checkpoint yet.' if step is None else f'The last good checkpoint is {self.folder / str(step)}.'

  def latest_step(self) -> int | None:
    """Step of the latest complete checkpoint, or None."""
    self._manager.reload()
    return self._manager.latest_step()

  def restore(self, states: TrainState, iterator: Any) -> TrainState | None:
    """The latest readable checkpoint; `iterator` is set to continue with the batch after it.

    Args:
      states: `jax.ShapeDtypeStruct`s with the shardings to restore to.
      iterator: of the training data.

    Returns:
      None if there is no checkpoint.

    Raises:
      NoCheckpoint: there are checkpoints, but none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    _, found, damaged = first_readable(steps, lambda step: self._read(step, states), self.folder, self._say)
    for other in damaged if jax.process_index() == 0 else ():
      # Out of the way, so that its step can be saved again; and kept, because it is not ours to destroy.
      aside = self.folder / f'damaged-{other}'
      if not self._in_bucket:
        shutil.rmtree(aside, ignore_errors=True)
      buckets.move(self.folder / str(other), aside, retention.COMMITTED)
    if damaged:
      processes.wait('damaged checkpoints are out of the way')
      self._manager.close()
      self._open()
    if found is None:
      return None
    state, about = found
    self._say_what_changed(about)
    iterator.set_state(about['data'])
    return state

  def before(self, limit: int, states: TrainState) -> tuple[int, TrainState] | None:
    """(step, state) of the latest readable checkpoint before step `limit`; None if there is none.

    Considers only regular checkpoints (`config.checkpoint.every`), which every run of this config has at this point.
    """
    self.wait()
    self._manager.reload()
    regular = retention.latest_regular(self._manager.all_steps(), self._options.every, self._options.keep)
    steps = [step for step in regular if step < limit]
    try:
      step, found, _ = first_readable(sorted(steps, reverse=True), lambda step: self._read(step, states), self.folder,
                                       self._say)
    except NoCheckpoint:
      return None
    return None if step is None or found is None else (step, found[0])

  def _read(self, step, states):
    """(state, about)."""
    items = _items(states)
    with processes.together('read its about'):
      checksums.check(self.folder / str(step), 'about/')
    try:
      with processes.together('read it'):
        restored = self._manager.restore(step, args=ocp.args.Composite(
            about=ocp.args.JsonRestore(), **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}))
      for name in items:
        verify(name, restored[name], restored['about'])
    except Exception:
      checksums.check(self.folder / str(step))
      raise
    found = {name: restored[name] for name in items}
    number = jax.device_put(np.int32(restored['about']['step']), states.step.sharding)
    return dataclasses.replace(states, step=number, **found), restored['about']

  def _say_what_changed(self, about):
    before, now = about['source'], self._data
    changes = [f'{name} was {before.get(name, "absent")}, now {now.get(name, "absent")}'
               for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changes:
      more = f'; and {len(changes) - 4} more' if len(changes) > 4 else ''
      self._say(f'The training data have changed since step {about["step"]}: {"; ".join(changes[:4])}{more}. Training '
                'continues with the current data; to repeat the run, restore the old data first.')

  def _set_damaged_scores_aside(self):
    # The manager reads all scores when it opens, and would fail at the first damaged one.
    for step in retention.complete(self.folder.parent) if jax.process_index() == 0 else ():
      path = self.folder / str(step) / 'metrics'
      try:
        checksums.check(path.parent, 'metrics/')
      except checksums.Damaged as error:
        if path.exists():
          buckets.move(path, path.with_name('damaged-metrics'))
          self._say(f'The score of the checkpoint {path.parent} is damaged ({error}): it cannot be kept as the best.')
    processes.wait('damaged scores are out of the way')

  def _write_checksums(self):
    # Called when all files are written, before the checkpoint gets its name, or in a bucket the file that says that it
    # is whole: a complete one has checksums.
    if jax.process_index() == 0:
      for partial in self.folder.glob(str(self._saving) if self._in_bucket else f'{self._saving}.orbax-checkpoint-tmp*'):
        checksums.write(partial)

  def _look_for_folder(self):
    vanished = [step for step in self._manager.all_steps() if not (self.folder / str(step)).is_dir()]
    if processes.largest(bool(vanished) or not (self._in_bucket or self.folder.is_dir())):
      names = ''.join(f' {step}' for step in sorted(vanished))
      self._say(f'Checkpoints{names} have vanished from {self.folder}. Training continues, and writes the next '
                'one now.')
      self._manager.close()
      self._open()


def _items(state: TrainState) -> dict[str, Any]:
  # Items without arrays (the state of stateless routers, an average that is not kept) have no folder.
  return {name: getattr(state, name) for name in _ITEMS if jax.tree.leaves(getattr(state, name))}
