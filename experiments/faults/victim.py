"""A training process with faults in its data and its disk, started by the sweep."""
import dataclasses
import errno
import os
import sys
import time
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from experiments.faults import config
from moejax import command_line
from moejax.parallel import processes
from moejax.training import loop, setup, workdir
from moejax.training.durability import lock


@dataclasses.dataclass(frozen=True)
class Faults:
  """The faults of a process; steps and their batches count from 1.

  Attributes:
    not_finite, spikes: steps whose batch has infinite pixels, or repeats one example; the same in every process.
    raises, stalls, slow: steps whose batch raises an error, never arrives, or takes more than `slow_data` seconds.
    disk_full: steps whose checkpoint does not fit on the disk.
  """
  not_finite: frozenset[int] = frozenset()
  spikes: frozenset[int] = frozenset()
  raises: frozenset[int] = frozenset()
  stalls: frozenset[int] = frozenset()
  slow: frozenset[int] = frozenset()
  disk_full: frozenset[int] = frozenset()


class _Injected(grain.DatasetIterator):
  """Batches with `faults`."""

  def __init__(self, batches, faults: Faults):
    super().__init__()
    self._batches, self._faults = batches, faults

  def __next__(self):
    step = self._batches.get_state()['next_index'] + 1
    if step in self._faults.raises:
      raise OSError(errno.EIO, 'the data cannot be read')
    if step in self._faults.stalls:
      time.sleep(10**6)
    if step in self._faults.slow:
      time.sleep(0.8)
    batch = next(self._batches)
    if step in self._faults.not_finite:
      batch = {**batch, 'image': batch['image'] * float('inf')}
    if step in self._faults.spikes:
      # The same image 16 times: the gradients of all examples point in the same direction.
      batch = {name: np.repeat(values[:1], len(values), 0) for name, values in batch.items()}
    return batch

  def get_state(self):
    return self._batches.get_state()

  def set_state(self, state):
    self._batches.set_state(state)


class _Pipeline:
  """The pipeline of a run, with faults in its training batches."""

  def __init__(self, pipeline, faults):
    self._pipeline, self._faults = pipeline, faults

  def __getattr__(self, name):
    return getattr(self._pipeline, name)

  def train(self, *arguments):
    return _Injected(self._pipeline.train(*arguments), self._faults)


def main(folder: Path, log: Path, steps: int, faults: Faults, process: int = 0, count: int = 1, port: int = 0) -> None:
  """Trains in `folder` as `python -m moejax.train` does, with output in `log`; ends the process."""
  descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
  logging.set_verbosity(logging.ERROR)
  _fill_disk(faults.disk_full)

  def binary():
    jax.config.update('jax_num_cpu_devices', 1)
    processes.start(*(f'localhost:{port}', count, process) if count > 1 else ())
    prepared = setup.prepare(config.get_config(str(steps)))
    say = print if process == 0 else lambda line: None
    with lock.held(folder, say):
      workdir.claim(folder, prepared.config)
      loop.train(dataclasses.replace(prepared, pipeline=_Pipeline(prepared.pipeline, faults)), folder, say)

  code = 0
  try:
    command_line.in_one_sentence(binary)
  except SystemExit as ended:
    code = ended.code
  except BaseException:  # the traceback of an error in the data belongs in the log
    sys.excepthook(*sys.exc_info())
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  # A fork of the sweep must not run the sweep's exit handlers.
  os._exit(code)


def _fill_disk(steps):
  if not steps:
    return
  save = ocp.JsonCheckpointHandler._save_fn

  async def no_space(self, about, directory):
    if about.get('step') in steps:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return await save(self, about, directory)

  ocp.JsonCheckpointHandler._save_fn = no_space
