"""Trains a config, from the last checkpoint in its folder to the last step.

    python -m moejax.train --config=configs/vmoe_digits.py --workdir=runs/vmoe_digits
    python -m moejax.train --config=configs/vmoe_digits.py --workdir=runs/k1 --config.model.moe.router.select.k=1
    python -m moejax.train --config=moejax://mixtral_c4:8x7b --workdir=runs/mixtral --config.mesh.expert=8

The same command resumes where the run stopped, however it stopped; with a larger `--config.training.steps` it extends
the run. With a smaller one a new run is short. From Python: `moejax.train.run(config, workdir)`.

Exit codes: 0 finished; 1 stopped early (diverged, no data, disk full); 2 the command or the config is wrong;
3 another process of the run has died; 128 + n stopped by signal n, with its state saved.
"""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax import command_line, config_files


def run(config: Any, workdir: str | Path, say: Callable[[str], None] = print) -> dict[str, Any]:
  """Trains `config` in `workdir` (see `training.loop.run`), and writes its report; returns the metrics of the last step."""
  from moejax.analysis import report
  from moejax.training import loop
  return loop.run(config, workdir, say, report.write)


def main() -> None:
  """The command."""
  flags = command_line.Parser('moejax.train', __doc__, keys='config')
  flags.add_config()
  flags.add_argument('--workdir', metavar='FOLDER',
                     help='folder of the run, or gs://bucket/folder: created if missing, resumed otherwise')
  flags.add_processes()
  given = flags.parse(needs=('config', 'workdir'))
  config = config_files.load(given.config, given.overrides)
  command_line.start_processes(given)
  run(config, given.workdir)


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
