"""The processes of a run, forked from this one after all imports, and ways to observe them."""
import os
import signal
import socket
import time
from pathlib import Path

from experiments.faults import victim
from moejax.training import metrics


class Processes:
  """One start of a run: `count` processes that train in `folder`, with output in `logs`.

  Attributes:
    began: step of the last row of metrics when they started.
  """

  def __init__(self, folder: Path, logs: Path, steps: int, faults: victim.Faults, count: int = 1):
    self.folder, self.logs = folder, [logs.with_suffix(f'.{i}.log') for i in range(count)]
    logs.parent.mkdir(parents=True, exist_ok=True)
    self._size, self._step = 0, 0
    self.began = self.step()
    port = _free_port()
    self.pids = []
    for index, log in enumerate(self.logs):
      pid = os.fork()
      if not pid:
        victim.main(folder, log, steps, faults, index, count, port)
      self.pids.append(pid)
    self.codes: dict[int, int] = {}

  def step(self) -> int:
    """Step of the last row of metrics; 0 if there is none."""
    path = self.folder / 'metrics.jsonl'
    size = path.stat().st_size if path.exists() else 0
    if size != self._size:  # Called a thousand times per second, so it must leave the processor to the run.
      rows = metrics.read(self.folder)
      self._size, self._step = size, rows[-1]['step'] if rows else 0
    return self._step

  def running(self) -> bool:
    """Whether all are still running."""
    for pid in self.pids:
      if pid not in self.codes:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
          self.codes[pid] = os.waitstatus_to_exitcode(status)
    return not self.codes

  def wait_for(self, arrived) -> bool:
    """Waits until `arrived()`; False if a process ends before."""
    while self.running():
      if arrived():
        return True
      time.sleep(0.002)
    return False

  def send(self, number: signal.Signals, index: int = 0) -> bool:
    """Sends a signal to one process; False if one had ended before."""
    if not self.running():
      return False
    os.kill(self.pids[index], number)
    return True

  def finish(self, within: float) -> list[int] | None:
    """The exit codes of all processes; None for a process that did not end `within` seconds and was killed."""
    deadline = time.monotonic() + within
    while len(self.codes) < len(self.pids) and time.monotonic() < deadline:
      self.running()
      time.sleep(0.005)
    hanging = [pid for pid in self.pids if pid not in self.codes]
    for pid in hanging:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
    return None if hanging else [self.codes[pid] for pid in self.pids]

  def output(self, index: int = 0) -> str:
    """The output of a process."""
    return self.logs[index].read_text(errors='replace') if self.logs[index].exists() else ''


def _free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]
