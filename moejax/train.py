"""Trains a config: `python -m moejax.train --config=configs/vmoe_digits.py --workdir=runs/vmoe_digits`.

Any key can be set from the command line, `--config.training.steps=100`; a config file may take an argument,
`--config=configs/x.py:tiny`. The same command goes on where the run stopped, however it stopped. From Python:
`moejax.train.run(config, workdir)`.

Exit codes: 0 finished; 1 stopped early (diverged, no data, disk full); 2 something is wrong with the command or the config;
3 another process of the run has died; 128 + n stopped by signal n, with its state saved.
"""
import ast
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moejax.config import ConfigError
from moejax.data import DataError
from moejax.parallel import processes
from moejax.training.loop import run
from moejax.training.recovery import Stopped

__all__ = ['run']

_USAGE = 'python -m moejax.train --config=configs/<file>.py --workdir=runs/<name>'


class _Literal(flags.ArgumentParser):
  """A number, a list, or else a word: for keys that are None in the config, which gives no type."""

  def parse(self, argument):
    try:
      return ast.literal_eval(argument)
    except (ValueError, SyntaxError):
      return argument


config_flags.register_flag_parser_for_type(type(None), _Literal())


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """The arguments that are no flags. Raises ConfigError, in a sentence, where flags or overrides cannot be parsed."""
  try:
    return values(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections names the part of the path that the config lacks, and the nearest one; a config file that fails by
    # itself says something else, and needs its traceback.
    message = str(error.args[0]).replace('\\n', '\n').replace('\\', '').replace('"', "'")
    missing = re.match(r"'*(\w+)'*(?:\n|$)", message)
    if not missing:
      raise
    path = next((arg.split('=')[0] for arg in argv if missing[1] in arg.split('=')[0].split('.')), missing[1])
    nearest = re.search(r"Did you mean '(\w+)'", message)
    raise ConfigError(f'{path}: the config has no key {missing[1]!r}.' +
                      (f' Did you mean {nearest[1]!r}?' if nearest else '')) from None
  except (flags.Error, OSError, ValueError, TypeError) as error:
    raise ConfigError(str(error)) from None


def checked(config) -> ConfigDict:
  """The value of --config. Raises ConfigError where the file is missing, or gave something else than a config."""
  if isinstance(config, ConfigDict):
    return config
  try:
    config.keys()  # What stands for a file that could not be loaded raises why.
  except OSError as error:
    raise ConfigError(f'There is no such config file: {error.__cause__}.') from None
  except AttributeError:
    pass
  raise ConfigError(f'get_config() of the config file must return a ConfigDict, not {type(config).__name__}.')


def in_one_sentence(binary: Callable[[], None]) -> None:
  """Runs `binary`; what a person can act on is printed as a sentence, without a traceback, and is the exit code."""
  try:
    binary()
  except (ConfigError, DataError) as error:
    sys.exit(_say(error, 2))
  except Stopped as error:
    _say(error, error.code)
    if error.at_once:
      sys.stdout.flush()
      os._exit(error.code)
    sys.exit(error.code)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    sys.exit(_say('The disk is full. Make room; the same command goes on from the last checkpoint.', 1))
  except KeyboardInterrupt:
    sys.exit(_say('Stopped at once. The same command goes on from the last checkpoint.', 130))


def _say(message, code: int) -> int:
  print(message, file=sys.stderr)
  return code


if __name__ == '__main__':
  config_flag = config_flags.DEFINE_config_file('config', None, 'Config file, with an argument after a colon.')
  workdir_flag = flags.DEFINE_string('workdir', None, 'Folder of the run: made if missing, gone on with if not.')
  start_processes = processes.define_flags()

  def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise ConfigError(f'{argv[1]!r} is no flag: {_USAGE} --config.<key>=<value>.')
    if not workdir_flag.value or config_flag.value is None:
      raise ConfigError(f'--config and --workdir are needed: {_USAGE}.')
    logging.set_verbosity(logging.ERROR)
    start_processes()
    run(checked(config_flag.value), workdir_flag.value)

  in_one_sentence(lambda: app.run(main, flags_parser=parse_flags))
