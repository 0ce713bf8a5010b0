"""Lists the files of moejax/ through which one forward pass goes: the stops of a reader who follows a token.

    python -m tests.forward_files configs/mixtral_chitchat.py

The model is built from the config and its forward pass traced, without data or compilation. First come the files that
compute: those whose lines are the source of the program's equations. Then those that are called and compute nothing
here (they name, choose, check, place or hand on), and those that only the build runs.
"""
import argparse
import collections
import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params

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
    equations: number of equations of the traced program whose source is a line of it.
  """
  path: str
  functions: tuple[str, ...]
  run: int
  lines: int
  equations: int = 0


def stops(config: str) -> tuple[list[File], list[File]]:
  """(files that the forward pass runs, files that only the build runs) of a decoder's config file, by first call."""
  keys = config_files.load(config).model
  with called() as building:
    model = models.build(keys)
    params, state = model.shapes()
  with called() as passing:
    program = jax.make_jaxpr(model.apply)(params, state, dict(tokens=jax.ShapeDtypeStruct((2, 16), jnp.int32)))
  computing = collections.Counter(sources(program.jaxpr))
  forward = [dataclasses.replace(file, equations=computing[file.path]) for file in files(passing)]
  passed = {file.path for file in forward}
  return forward, [file for file in files(building) if file.path not in passed]


def sources(program: Jaxpr) -> Iterator[str]:
  """The file of moejax/ that each equation comes from, by its innermost call; none for equations of jax alone."""
  for equation in program.eqns:
    if traceback := equation.source_info.traceback:
      calls = (Path(frame.file_name) for frame in traceback.frames)
      if path := next((path for path in calls if path.is_relative_to(PACKAGE)), None):
        yield str(path.relative_to(PACKAGE))
    for inner in jaxprs_in_params(equation.params):
      yield from sources(inner)


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
  row = '{:32} {:>9} {:>5} {:>5}  {}'.format
  named = lambda file: ', '.join(name for name in file.functions if '<' not in name)
  total = lambda count: sum(map(count, found))
  return '\n'.join([row(what, 'equations', 'run', 'lines', 'functions'),
                    *(row(file.path, file.equations, file.run, file.lines, named(file)) for file in found),
                    row(f'{len(found)} files', total(lambda file: file.equations), total(lambda file: file.run),
                        total(lambda file: file.lines), total(lambda file: len(file.functions)))])


def main() -> None:
  parser = argparse.ArgumentParser('python -m tests.forward_files', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('config', help='config file of a decoder, e.g. configs/mixtral_chitchat.py')
  forward, build = stops(parser.parse_args().config)
  computing = [file for file in forward if file.equations]
  print(table('computes', computing), table('is called', [file for file in forward if not file.equations]),
        table('only the build', build), sep='\n\n')


if __name__ == '__main__':
  main()
