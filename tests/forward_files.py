"""Lists the files of moejax/ through which one forward pass runs: the stops of a reader who follows a token.

    python -m tests.forward_files configs/mixtral_chitchat.py

The model is built from the config and its forward pass traced, without data or compilation. Files that only the build
runs are listed by themselves.
"""
import argparse
import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

import jax
import jax.numpy as jnp

from moejax import config_files, models

PACKAGE = Path(models.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class File:
  """A file of moejax/ that runs.

  Attributes:
    path: relative to the package.
    functions: its functions that run, in the order of their first calls.
    run: number of lines of these functions.
    lines: number of lines of the file.
  """
  path: str
  functions: tuple[str, ...]
  run: int
  lines: int


def stops(config: str) -> tuple[list[File], list[File]]:
  """(files that the forward pass runs, files that only the build runs) of a decoder's config file, by first call."""
  keys = config_files.load(config).model
  with called() as building:
    model = models.build(keys)
    params, state = model.shapes()
  with called() as passing:
    jax.eval_shape(model.apply, params, state, dict(tokens=jax.ShapeDtypeStruct((2, 16), jnp.int32)))
  forward = files(passing)
  passed = {file.path for file in forward}
  return forward, [file for file in files(building) if file.path not in passed]


@contextlib.contextmanager
def called() -> Iterator[dict[CodeType, None]]:
  """The code of all functions called within it, in the order of first calls."""
  codes: dict[CodeType, None] = {}

  def note(frame, event, _):
    if event == 'call' and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function, not a module or class body
      codes.setdefault(frame.f_code)

  sys.setprofile(note)
  try:
    yield codes
  finally:
    sys.setprofile(None)


def files(codes: Iterable[CodeType]) -> list[File]:
  """The files of moejax/ that hold this code, in its order."""
  found: dict[Path, list[CodeType]] = {}
  for code in codes:
    if (path := Path(code.co_filename)).is_relative_to(PACKAGE):
      found.setdefault(path, []).append(code)
  return [File(str(path.relative_to(PACKAGE)), tuple(dict.fromkeys(code.co_qualname for code in codes)),
               len(set().union(*map(_lines, codes))), len(path.read_text(encoding='utf-8').splitlines()))
          for path, codes in found.items()]


def _lines(code: CodeType) -> range:
  return range(code.co_firstlineno, 1 + max(line for *_, line in code.co_lines() if line))


def table(what: str, found: list[File]) -> str:
  """A line for each file: the lines that run, all lines, and the functions, without those inside of functions."""
  row = '{:32} {:>5} {:>5}  {}'.format
  named = lambda file: ', '.join(name for name in file.functions if '<' not in name)
  return '\n'.join([row(what, 'run', 'lines', 'functions'),
                    *(row(file.path, file.run, file.lines, named(file)) for file in found),
                    row(f'{len(found)} files', sum(file.run for file in found), sum(file.lines for file in found),
                        sum(len(file.functions) for file in found))])


def main() -> None:
  parser = argparse.ArgumentParser('python -m tests.forward_files', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('config', help='config file of a decoder, e.g. configs/mixtral_chitchat.py')
  forward, build = stops(parser.parse_args().config)
  print(table('forward pass', forward), table('only the build', build), sep='\n\n')


if __name__ == '__main__':
  main()
