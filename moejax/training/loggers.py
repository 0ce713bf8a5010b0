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
import io
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moejax import json_lines
from moejax.config import ConfigError, Registry
from moejax.training.workdir import write_atomically

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Opening:
  """What a logger opens with.

  Attributes:
    folder: of the run.
    config: of the run, as nested dicts.
    rows: up to `step`, each with its 'step'.
    step: the run resumes after it; 0 for a new run.
    say: receives messages for the user.
  """
  folder: Path
  config: dict[str, Any]
  rows: list[Row]
  step: int
  say: Callable[[str], None]


class Logger:
  """A destination of rows.

  Attributes:
    needs: package that must be installed; None: none beyond the requirements of moejax.
  """
  needs: str | None

  def __init__(self, opening: Opening):
    ...

  def write(self, step: int, row: Row) -> None:
    """Writes `row` (numbers, and lists of them), measured at `step`."""

  def sync(self) -> None:
    """Returns when all rows are on disk. By default, at once."""

  def close(self, failed: bool) -> None:
    """Closes the destination; `failed`: the run did not finish."""

  def where(self) -> str | None:
    """Where the rows are, or the command that shows them; None if no installed program can."""


LOGGERS = Registry('logger', Logger, context=('opening',))


def check(names: Iterable[str]) -> None:
  """Raises ConfigError where a logger needs a package that is not installed."""
  for name in names:
    needs = LOGGERS[name].needs
    if needs and not importlib.util.find_spec(needs):
      raise ConfigError(f'config.loggers: {name!r} needs the package {needs}, which is not installed. '
                        f'Install it (pip install {needs}), or remove {name!r} from config.loggers.')


def installed(program: str) -> bool:
  """Whether a program is installed: on the PATH, or importable."""
  return bool(shutil.which(program) or importlib.util.find_spec(program))


def scalars(row: Row) -> dict[str, float]:
  """The numbers of `row`; of a list, `<name>/smallest` and `<name>/largest`.

  A curve for each of 100 experts would be too many. Non-finite values become NaN, and so does None, their form in JSON.
  """
  flat = {}
  for name, value in row.items():
    if isinstance(value, list):
      numbers = np.asarray(value, float)
      flat |= {f'{name}/smallest': numbers.min().item(), f'{name}/largest': numbers.max().item()}
    else:
      flat[name] = int(value) if isinstance(value, bool) else value
  return {name: value if value is not None and math.isfinite(value) else math.nan for name, value in flat.items()}


class _FileLogger(Logger):
  # A logger that appends to `_file`, which is open at `_path`.
  needs = None
  _path: Path
  _file: TextIO

  def close(self, failed):
    self._file.close()

  def where(self):
    return str(self._path)


@LOGGERS('jsonl')
class JsonLines(_FileLogger):
  """metrics.jsonl: one object per line, with lists in full; always written."""
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


@LOGGERS('csv')
class Csv(_FileLogger):
  """metrics.csv: one column per number, in order of first appearance.

  When a row has new columns (the first evaluation), the file is rewritten with the longer header. A missing value is
  empty, a non-finite one is nan.
  """

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
    whole = io.StringIO()
    csv.writer(whole, lineterminator='\n').writerows([self._columns, *rows])
    write_atomically(self._path, whole.getvalue())
    self._file = open(self._path, 'a', newline='')
    self._writer = csv.writer(self._file, lineterminator='\n')


@LOGGERS('tensorboard')
class TensorBoard(Logger):
  """tensorboard/: event files, for TensorBoard and other viewers."""
  needs = 'tensorboardX'

  def __init__(self, opening: Opening):
    import tensorboardX
    self._folder = opening.folder / 'tensorboard'
    new = not self._folder.exists()
    # Event files cannot be truncated; TensorBoard ignores their rows from the purge step on.
    self._board = tensorboardX.SummaryWriter(str(self._folder), purge_step=opening.step + 1)
    for row in opening.rows if new else ():
      self.write(row['step'], {name: value for name, value in row.items() if name != 'step'})

  def write(self, step, row):
    for name, value in scalars(row).items():
      if math.isfinite(value):  # TensorBoard cannot show others, and would warn at every row.
        self._board.add_scalar(name, value, step)
    self._board.flush()

  def close(self, failed):
    self._board.close()

  def where(self):
    return f'tensorboard --logdir {self._folder}' if installed('tensorboard') else None


@LOGGERS('wandb')
class Wandb(Logger):
  """Weights & Biases: its run resumes when this run does. WANDB_PROJECT, WANDB_MODE, ... apply."""
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
      raise ConfigError(f"config.loggers: 'wandb' cannot start: {str(error).splitlines()[0].rstrip('.')}. Log in "
                        "(wandb login), set WANDB_MODE=offline, or remove 'wandb' from config.loggers.") from error
    # An offline run also holds all earlier rows: syncing the latest is enough.
    self._where = f'wandb sync {Path(self._run.dir).parent}' if self._run.offline else self._run.url
    # The next step that it accepts; it ignores rows of earlier steps.
    self._next = self._run.step
    if self._next > opening.step + 1:
      opening.say(f'wandb has rows up to step {self._next - 1} and cannot remove those after step {opening.step}: it '
                  f'keeps them, and receives new ones from step {self._next} on.')
    for row in opening.rows:
      self.write(row['step'], {name: value for name, value in row.items() if name != 'step'})

  def write(self, step, row):
    if step >= self._next:
      self._run.log(scalars(row), step=step)

  def close(self, failed):
    self._run.finish(exit_code=int(failed))

  def where(self):
    return self._where
