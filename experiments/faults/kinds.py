"""The faults: how a run is disturbed, and what its processes must then do.

A kind defines the faults that a process starts with, disturbs it from outside, and checks how it ends.
"""
import dataclasses
import random
import re
import shutil
import signal
import time
from pathlib import Path

from experiments.faults.process import Processes
from experiments.faults.victim import Faults

EVERY, AHEAD = 5, 25


class Kind:
  """kill -9 at any moment of a process, from its start on.

  Attributes:
    name: in the table.
    steps, count: of a run, and its processes.
    per_run: maximum number of disturbances per run.
    lasting: faults of every process of a run, including the undisturbed one.
  """
  name = 'kill -9 at any moment'
  steps = 100
  count = 1
  per_run = 8

  def __init__(self, chance: random.Random):
    self.chance, self.lasting = chance, Faults()

  def faults(self, began: int) -> Faults:
    """Faults of the process about to start, when the last row of metrics is of step `began`."""
    del began
    return self.lasting

  def disturb(self, processes: Processes) -> bool:
    """Waits for the moment and disturbs the process; False if it had ended before."""
    if self.chance.random() < 0.2:
      time.sleep(self.chance.uniform(0, 8))  # during startup
    else:
      self.wait_some_steps(processes)
    return processes.send(signal.SIGKILL)

  def ended_well(self, processes: Processes, codes: list[int]) -> str | None:
    """What was wrong with the end of a disturbed process; None if nothing."""
    del processes
    return None if codes == [-signal.SIGKILL] else f'exit codes {codes}'

  def went_on_well(self, processes: Processes) -> str | None:
    """What was wrong with how the next process resumed; None if nothing."""
    del processes

  def wait_some_steps(self, processes: Processes) -> bool:
    """Waits for a random number of steps, and a few milliseconds more."""
    ahead = self.chance.randint(1, AHEAD)
    reached = processes.wait_for(lambda: processes.step() >= processes.began + ahead)
    time.sleep(self.chance.uniform(0, 0.05))
    return reached


class KillWhileSaving(Kind):
  """kill -9 while the files of a checkpoint are being written."""
  name = 'kill -9 during a save'

  def disturb(self, processes):
    for _ in range(self.chance.randint(1, 4)):
      known = set(_partial(processes.folder))
      processes.wait_for(lambda: set(_partial(processes.folder)) - known)
    time.sleep(self.chance.choice((0, 0.3)) * self.chance.random())
    return processes.send(signal.SIGKILL)


class KillOneOfFour(Kind):
  """kill -9 of one process of four; the others must end on their own, with a message."""
  name = 'kill -9 of one process of four'
  steps = 40
  count = 4
  per_run = 3

  def disturb(self, processes):
    self.wait_some_steps(processes)
    self.killed = self.chance.randrange(self.count)
    return processes.send(signal.SIGKILL, self.killed)

  def ended_well(self, processes, codes):
    for index, code in enumerate(codes):
      if index != self.killed and (code != 3 or 'has died' not in processes.output(index)):
        return f'exit codes {codes} after process {self.killed} was killed'
    return None


class Terminate(Kind):
  """SIGTERM; the state must be saved."""
  name = 'SIGTERM'

  def disturb(self, processes):
    self.wait_some_steps(processes)
    self._sent = time.monotonic()
    return processes.send(signal.SIGTERM)

  def ended_well(self, processes, codes):
    took = time.monotonic() - self._sent
    return None if codes == [143] and took < 30 else f'exit codes {codes} after {took:.0f} s'


class Vanish(Kind):
  """All checkpoints are deleted during the run, and some steps later it is killed."""
  name = 'checkpoint folder deleted, later kill -9'

  def disturb(self, processes):
    self.wait_some_steps(processes)
    if not processes.running():
      return False
    shutil.rmtree(processes.folder / 'checkpoints', ignore_errors=True)
    gone = processes.step()
    ahead = self.chance.randint(0, 3 * EVERY)
    processes.wait_for(lambda: processes.step() >= gone + ahead)
    return processes.send(signal.SIGKILL)


class Corrupt(Kind):
  """kill -9, and a changed, shortened or deleted file of the newest checkpoint, which must be named if it is needed."""
  name = 'file of the newest checkpoint damaged'

  def disturb(self, processes):
    self.damaged = None
    return super().disturb(processes)

  def ended_well(self, processes, codes):
    complete = sorted((path for path in (processes.folder / 'checkpoints').glob('*') if path.name.isdigit()),
                      key=lambda path: int(path.name))
    if len(complete) > 1:
      path = self.damaged = self.chance.choice(sorted(path for path in complete[-1].rglob('*') if path.is_file()))
      content = bytearray(path.read_bytes())
      how = self.chance.choice(('change', 'shorten', 'delete'))
      if how == 'delete' or not content:
        path.unlink()
      elif how == 'shorten':
        path.write_bytes(content[:self.chance.randrange(len(content))])
      else:
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(content)
    return super().ended_well(processes, codes)

  def went_on_well(self, processes):
    text = processes.output()
    if self.damaged is None or 'is damaged' not in text:
      return None  # the damaged file is not needed to resume
    name = str(self.damaged.relative_to(next(p for p in self.damaged.parents if p.name.isdigit())))
    return None if name in text else f'{name} was damaged but is not named'


class NotFinite(Kind):
  """Non-finite batches, single and two in a row, which triggers a rollback; and kill -9."""
  name = 'batches that are not finite'
  per_run = 2
  batches = 'not_finite'
  first = 20

  def __init__(self, chance):
    super().__init__(chance)
    steps = set()
    for step in range(self.first, self.steps - 5, 15):
      step += chance.randrange(5)
      steps |= {step, step + 1} if chance.random() < 0.5 else {step}
    self.lasting = dataclasses.replace(Faults(), **{self.batches: frozenset(steps)})


class Spikes(NotFinite):
  """Batches whose gradient spikes, once the run has enough history to detect it."""
  name = 'batches that spike'
  batches = 'spikes'
  first = 72


class _Data(Kind):
  """Reading one batch fails in some way."""
  code: int
  says: str
  fault: str

  def faults(self, began):
    return dataclasses.replace(Faults(), **{self.fault: frozenset([began + self.chance.randint(1, AHEAD)])})

  def disturb(self, processes):
    return not processes.wait_for(lambda: self.says in processes.output()) or True

  def ended_well(self, processes, codes):
    text = processes.output()
    return None if codes == [self.code] and self.says in text else f'exit codes {codes}'


class Slow(_Data):
  """A late batch is reported, and the run continues."""
  name, fault, code, says = 'slow batch', 'slow', 0, 's for its batch'


class Stall(_Data):
  """A batch that never arrives ends the run with a checkpoint."""
  name, fault, code, says = 'data worker hangs', 'stalls', 1, 'config.recovery.data_timeout'


class Raise(_Data):
  """A batch that cannot be read ends the run with a checkpoint."""
  name, fault, code, says = 'data worker fails', 'raises', 1, 'the data cannot be read'


class DiskFull(Kind):
  """A checkpoint that does not fit on the disk; some steps later kill -9."""
  name = 'disk full, later kill -9'

  def faults(self, began):
    return Faults(disk_full=frozenset([(began // EVERY + self.chance.randint(1, 3)) * EVERY]))


def _partial(folder: Path) -> list[str]:
  return [path.name for path in (folder / 'checkpoints').glob('*.orbax-checkpoint-tmp*')]


def resumed_at(text: str) -> int | None:
  """The step after which a process resumed, from its output; None if it was killed before."""
  found = re.search(r'Resuming after step (\d+)', text)
  return int(found[1]) if found else 0 if 'step 1/' in text else None


# Each kind's share of --kills; for other faults, their number per 200 kills.
KILLS = {'kill': (Kind, 0.5), 'kill_while_saving': (KillWhileSaving, 0.44), 'kill_one_of_four': (KillOneOfFour, 0.06)}
OTHERS = {'terminate': (Terminate, 10), 'vanish': (Vanish, 5), 'corrupt': (Corrupt, 10), 'not_finite': (NotFinite, 10),
          'spikes': (Spikes, 6), 'slow': (Slow, 2), 'stall': (Stall, 4), 'raise': (Raise, 2),
          'disk_full': (DiskFull, 4)}


def named(name: str) -> type[Kind]:
  """The kind with this name."""
  return {**KILLS, **OTHERS}[name][0]
