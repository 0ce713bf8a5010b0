"""Where the metrics of a run go, by name: `config.loggers`.

    loggers=('tensorboard', 'csv')    besides metrics.jsonl, which is always written: resuming and the report read it

A logger opens with the rows that the run keeps (`Opening`). Rows after the checkpoint that the run resumes from are
removed, or the logger says that it cannot remove them. A rollback removes none: it turns back neither the step nor the
data.
"""
import csv
import dataclasses
import importlib
import importlib.util
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moejax import json_lines
from moejax.config import ConfigError, Registry
from moejax.training.workdir import write_atomically

LOGGERS = Registry('logger')

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Opening:
  """What a logger begins with.

  Attributes:
    folder: of the run.
    config: of the run, as nested dicts.
    rows: of the steps up to `step`, each with its 'step'.
    step: that the run resumes after; 0 for a new run.
    say: receives sentences for the person who runs this.
  """
  folder: Path
  config: dict[str, Any]
  rows: list[Row]
  step: int
  say: Callable[[str], None]


class Logger(Protocol):
  """One place where rows are written.

  Attributes:
    needs: a package that has to be installed; None: nothing beyond what moejax requires.
  """
  needs: str | None

  def __init__(self, opening: Opening):
    ...

  def write(self, step: int, row: Row) -> None:
    """Writes `row` (numbers, and lists of them) as that of `step`."""

  def close(self, failed: bool) -> None:
    """Ends; `failed`: the run did not finish."""

  def where(self) -> str | None:
    """Where a person finds the rows, or the command that shows them; None where nothing installed can."""


def check(names: Iterable[str]) -> None:
  """Raises ConfigError where a logger needs a package that is not installed."""
  for name in names:
    needs = LOGGERS[name].needs
    if needs and not importlib.util.find_spec(needs):
      raise ConfigError(f'config.loggers: {name!r} needs the package {needs}, which is not installed. '
                        f'Install it (pip install {needs}), or take {name!r} out of config.loggers.')


def installed(program: str) -> bool:
  """Whether a program can be started: it is on the PATH, or importable."""
  return bool(shutil.which(program) or importlib.util.find_spec(program))


def scalars(row: Row) -> dict[str, float]:
  """The numbers of `row`; of a list, `<name>/smallest` and `<name>/largest`.

  Nobody reads a curve for each of 100 experts. A value that is not finite is NaN; so is None, which JSON has in its place.
  """
  flat = {}
  for name, value in row.items():
    if isinstance(value, list):
      numbers = np.asarray(value, float)
      flat |= {f'{name}/smallest': numbers.min().item(), f'{name}/largest': numbers.max().item()}
    else:
      flat[name] = int(value) if isinstance(value, bool) else value
  return {name: value if value is not None and math.isfinite(value) else math.nan for name, value in flat.items()}


@LOGGERS('jsonl')
class JsonLines:
  """metrics.jsonl: an object a line, with lists in full; always written."""
  needs = None
  FILE = 'metrics.jsonl'

  def __init__(self, opening: Opening):
    self._path = opening.folder / self.FILE
    write_atomically(self._path, ''.join(map(json_lines.line, opening.rows)))
    self._file = open(self._path, 'a')

  def write(self, step, row):
    self._file.write(json_lines.line({'step': step, **row}))
    self._file.flush()

  def sync(self) -> None:
    """Returns when all rows are on disk."""
    os.fsync(self._file.fileno())

  def close(self, failed):
    self._file.close()

  def where(self):
    return str(self._path)


@LOGGERS('csv')
class Csv:
  """metrics.csv: a column a number, in the order in which they first appeared.

  Where a row has new columns (the first evaluation), the file is written anew with the longer header. A missing value
  is empty, one that is not finite is nan.
  """
  needs = None

  def __init__(self, opening: Opening):
    self._path = opening.folder / 'metrics.csv'
    rows = [scalars(row) for row in opening.rows]
    self._columns = list(dict.fromkeys(['step', *(name for row in rows for name in row)]))
    self._begin([row.get(name, '') for name in self._columns] for row in rows)

  def write(self, step, row):
    row = scalars({'step': step, **row})
    if new := [name for name in row if name not in self._columns]:
      self._file.close()
      with open(self._path, newline='') as file:
        rows = csv.reader(file)
        next(rows)
        self._columns += new
        self._begin([*values, *[''] * len(new)] for values in rows)
    self._writer.writerow([row.get(name, '') for name in self._columns])
    self._file.flush()

  def _begin(self, rows: Iterable[list]):
    partial = self._path.with_name(self._path.name + '.partial')
    self._file = open(partial, 'w', newline='')
    self._writer = csv.writer(self._file, lineterminator='\n')
    self._writer.writerow(self._columns)
    self._writer.writerows(rows)
    self._file.flush()
    os.replace(partial, self._path)  # the open file moves along, and is appended to

  def close(self, failed):
    self._file.close()

  def where(self):
    return str(self._path)


@LOGGERS('tensorboard')
class TensorBoard:
  """tensorboard/: event files, which TensorBoard and others show."""
  needs = 'tensorboardX'

  def __init__(self, opening: Opening):
    import tensorboardX
    self._folder = opening.folder / 'tensorboard'
    new = not self._folder.exists()
    # Event files cannot be cut; TensorBoard drops what they hold from the purge step on.
    self._board = tensorboardX.SummaryWriter(str(self._folder), purge_step=opening.step + 1)
    for row in opening.rows if new else ():
      self.write(row['step'], {name: value for name, value in row.items() if name != 'step'})

  def write(self, step, row):
    for name, value in scalars(row).items():
      if math.isfinite(value):  # TensorBoard has no place for it, and would warn at every row.
        self._board.add_scalar(name, value, step)
    self._board.flush()

  def close(self, failed):
    self._board.close()

  def where(self):
    return f'tensorboard --logdir {self._folder}' if installed('tensorboard') else None


@LOGGERS('wandb')
class Wandb:
  """Weights & Biases: the run there resumes when the run does. Its variables (WANDB_PROJECT, WANDB_MODE, ...) apply."""
  needs = 'wandb'

  def __init__(self, opening: Opening):
    wandb: Any = importlib.import_module('wandb')  # not a dependency
    identity = opening.folder / 'wandb' / 'run_id'
    if not identity.exists():
      identity.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(identity, uuid.uuid4().hex[:8])
    try:
      self._run = wandb.init(
          project=os.environ.get('WANDB_PROJECT', 'moejax'), id=identity.read_text(), resume='allow',
          name=os.environ.get('WANDB_NAME', opening.folder.resolve().name), dir=str(opening.folder),
          config=opening.config)
    except wandb.errors.Error as error:
      raise ConfigError(f"config.loggers: 'wandb' cannot begin: {str(error).splitlines()[0].rstrip('.')}. Log in "
                        "(wandb login), set WANDB_MODE=offline, or take 'wandb' out of config.loggers.") from error
    # An offline run holds the rows from before it as well: to sync the last is enough.
    self._where = f'wandb sync {Path(self._run.dir).parent}' if self._run.offline else self._run.url
    # The next step that it takes; it ignores rows of steps before.
    self._next = self._run.step
    if self._next > opening.step + 1:
      opening.say(f'wandb has rows up to step {self._next - 1} and cannot take back those after step {opening.step}: '
                  f'it keeps them, and gets new ones from step {self._next} on.')
    for row in opening.rows:
      self.write(row['step'], {name: value for name, value in row.items() if name != 'step'})

  def write(self, step, row):
    if step >= self._next:
      self._run.log(scalars(row), step=step)

  def close(self, failed):
    self._run.finish(exit_code=int(failed))

  def where(self):
    return self._where
