"""What all commands share: flags, keys of a config as flags, and failures that end in a sentence and an exit code.

    def main() -> None:
      flags = Parser('moejax.train', __doc__, keys='config')
      flags.add_argument('--workdir', help='folder of the run')
      given = flags.parse(needs=('workdir',))
      ...

    script = lambda: in_one_sentence(main)

    if __name__ == '__main__':
      script()

`python -m <module>` and the console script of setup.py both run `script`.

Commands import jax after they have parsed their flags, so that --help and a misspelt flag are answered at once.
"""
import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import logging

from moejax import config_files, platforms, streams
from moejax.config import ConfigError, Explained, nearest

_KEYS = """--{keys}.<path>=<value> sets any key of the {keys}; `python -m moejax.describe <config>` lists them. A value
is a Python literal (3, 1e-3, None, True or true, "(1, 2)", "['a']"), and else text: bfloat16 needs no quotes, and a
number that is meant as text needs two kinds ('"16"'). A path may count: data.augment[0].name. A dict replaces its whole
group: it has a `name`, or is {{}}, or has all keys that the group had, and is refused otherwise; set single keys by
their paths. Groups that the config leaves out, or at None, are made. Later flags win."""


class Parser(argparse.ArgumentParser):
  """The flags of `python -m <module>` or its console script: `--help` prints `description`, flags, and how keys are set.

  Args:
    module: e.g. 'moejax.train'.
    description: docstring of the command, with examples in it.
    keys: what `--<keys>.<path>=<value>` sets, 'config' or 'source'; None: there is no such thing.
    usage: what follows the command, in short.
  """

  def __init__(self, module: str, description: str | None, keys: str | None = None, usage: str = '[flags]'):
    called = Path(sys.argv[0]).name
    super().__init__(prog=called if called.startswith('moejax-') else f'python -m {module}', description=description,
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog=keys and _KEYS.format(keys=keys), usage=f'%(prog)s {usage}')
    self.keys = keys

  def add_config(self) -> None:
    """--config=FILE[:ARGUMENT], which `config_files.load` reads."""
    self.add_argument('--config', metavar='FILE[:ARGUMENT]',
                      help='config file, e.g. configs/vmoe_digits.py or configs/mixtral_c4.py:8x7b, or a shipped one, '
                           'e.g. moejax://vmoe_digits')

  def add_processes(self) -> None:
    """The arguments of `parallel.processes.start`."""
    group = self.add_argument_group('one of several processes', 'Only where no cluster tells them of one another.')
    group.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0')
    group.add_argument('--num_processes', metavar='N', type=int, help='of this run; 1: this one alone, on any cluster')
    group.add_argument('--process_id', metavar='I', type=int, help='which of them this is, from 0')

  def parse(self, arguments: Sequence[str] | None = None, needs: Iterable[str] = ()) -> argparse.Namespace:
    """The values of all flags, and in `overrides` {path: value} of the keys that were set.

    Args:
      arguments: those of the process, by default.
      needs: flags that must be given.

    Raises:
      ConfigError: in a sentence, with the nearest flag where there is none of that name.
    """
    rest, overrides = self._split(list(sys.argv[1:] if arguments is None else arguments))
    for argument in rest:
      name = argument.partition('=')[0]
      if name.startswith('--') and name not in self._option_string_actions:
        self.error(f'There is no flag {name}. {self._nearest(name)}')
    given, unknown = self.parse_known_args(rest)
    if unknown:
      self.error(f'{unknown[0]!r} is no flag. Flags begin with two dashes.')
    missing = [f'--{name}' for name in needs if getattr(given, name) in (None, '')]
    if missing:
      self.error(f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} missing.')
    given.overrides = overrides
    return given

  def error(self, message: str):
    raise ConfigError(f'{message[:1].upper()}{message[1:].rstrip(".")}. See {self.prog} --help.')

  def _split(self, arguments):
    # Takes out what sets a key: `--config.a.b=1`, or `--config.a.b 1`.
    rest, overrides = [], {}
    while arguments:
      argument = arguments.pop(0)
      if self.keys is None or not argument.startswith(f'--{self.keys}.'):
        rest.append(argument)
        continue
      name, equals, text = argument.partition('=')
      if not equals:
        if not arguments or arguments[0].startswith('--'):
          self.error(f'{name} has no value: write {name}=<value>')
        text = arguments.pop(0)
      overrides.pop(path := name.removeprefix(f'--{self.keys}.'), None)  # the later flag also comes later
      overrides[path] = config_files.parse_value(text)
    return rest, overrides

  def _nearest(self, name):
    flags = [flag for flag in self._option_string_actions if flag.startswith('--')]
    if self.keys:
      flags.append(f'--{self.keys}.<key>')
    if self.keys and '.' in name:
      return f'Keys are set with --{self.keys}.<key>=<value>'
    return nearest(name, flags)


def start_processes(given: argparse.Namespace) -> None:
  """Joins the other processes of the run that the flags of `add_processes` name, if any."""
  from moejax.parallel import processes
  processes.start(given.coordinator, given.num_processes, given.process_id)


def in_one_sentence(binary: Callable[[], int | None]) -> None:
  """Runs `binary`; what a person can act on is printed as a sentence, without a traceback, and is the exit code.

  What `binary` returns is the exit code otherwise; None: nothing happens.
  """
  streams.outlive_readers()
  platforms.choose()
  logging.set_verbosity(logging.ERROR)
  try:
    code = binary()
  except Explained as error:
    _say(error, error.code)
    if error.at_once:
      sys.stdout.flush()
      os._exit(error.code)
    sys.exit(error.code)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    sys.exit(_say('The disk is full. Make room; the same command resumes from the last checkpoint.', 1))
  except KeyboardInterrupt:
    sys.exit(_say('Stopped at once. The same command resumes from the last checkpoint.', 130))
  if code is not None:
    sys.exit(code)


def _say(message, code: int) -> int:
  print(message, file=sys.stderr)
  return code
