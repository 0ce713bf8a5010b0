"""Tile sizes of kernels: a table of the fastest measured, and the program that measures them.

    python -m moejax.kernels.tuning --implementation=pallas_gpu --rows=16384 --experts=8 --dim=4096 --hidden=14336
    python -m moejax.kernels.tuning --implementation=pallas_tpu --rows=262144 --experts=64 --dim=2048 --hidden=1024
    python -m moejax.kernels.tuning --implementation=triton --rows=25088 --experts=32 --dim=768 --hidden=3072

Only this program measures. Kernels look up their tiles while they are traced (`choose`): in the user's table
(`$MOEJAX_TUNING_CACHE`, or ~/.cache/moejax/tuning.json), then in tuned.json beside this file; otherwise they use the
first of their candidates. A module can be tuned if it has

    candidates(kernel, shape) -> list of dataclasses or named tuples: valid tiles, best guess first
    IMPLEMENTATION, whose functions take one of them as `tiles=`
"""
import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moejax import command_line
from moejax.config import ConfigError
from moejax.kernels import padding
from moejax.kernels.choice import Implementation, Shape
from moejax.kernels.target import target

MODULES = {'pallas_gpu': 'moejax.kernels.hopper', 'pallas_tpu': 'moejax.kernels.pallas_tpu',
           'triton': 'moejax.kernels.triton'}
# `up` is measured with a gate, which has the most operands; without one it uses the same tiles.
KERNELS = ('matmul', 'transposed', 'weight_gradient', 'up')
SHIPPED = pathlib.Path(__file__).with_name('tuned.json')
_TURNS, _CALLS = 9, 10


class SparseLayer(NamedTuple):
  """A sparse layer: `rows` choices (tokens times experts per token) of `experts`, each dim to hidden and back."""
  rows: int
  experts: int
  dim: int
  hidden: int
  dtype: str = 'bfloat16'

  def shapes(self, row_multiple: int) -> tuple[Shape, Shape]:
    """Shapes of its two matmuls, as in tables: rows without padding, rounded down to whole blocks."""
    rows = self.rows // row_multiple * row_multiple
    return (Shape(rows, self.experts, self.dim, self.hidden, self.dtype),
            Shape(rows, self.experts, self.hidden, self.dim, self.dtype))


# Layers in the shipped table.
LAYERS = {
    'Mixtral 8x7B': SparseLayer(16384, 8, 4096, 14336),
    'Qwen3 30B-A3B': SparseLayer(262144, 128, 2048, 768),
    'OLMoE 1B-7B': SparseLayer(262144, 64, 2048, 1024),
    'DeepSeek-V3, 32 of 256 experts': SparseLayer(131072, 32, 7168, 2048),
    'V-MoE B/16': SparseLayer(25088, 32, 768, 3072),
}


# ---- The table.


def user_table() -> pathlib.Path:
  """Path of the user's table."""
  return pathlib.Path(os.environ.get('MOEJAX_TUNING_CACHE') or os.path.expanduser('~/.cache/moejax/tuning.json'))


def key(kind: str, implementation: str, kernel: str, shape: Shape) -> str:
  """The name of an entry. Rows and groups are rounded to powers of two; widths are exact, because tiles divide them.

  `shape.rows` is the number before padding, as in `SparseLayer.shapes`: padded rows less one block per group.
  """
  rows, groups = (2**round(math.log2(max(n, 1))) for n in (shape.rows, shape.groups))
  return (f'{kind} | {implementation} | {kernel} | {rows}x{shape.inner}x{shape.outer} in {groups} | '
          f'{jnp.dtype(shape.dtype).name}')


def best(kind: str, implementation: str, kernel: str, shape: Shape) -> dict[str, Any] | None:
  """The tabulated tiles for one of `KERNELS` on a kind of device; the user's table overrides the shipped one.

  Raises:
    ConfigError: a table cannot be read; the message names the file.
  """
  name = key(kind, implementation, kernel, shape)
  for path in user_table(), SHIPPED:
    if name in (table := _read(path)):
      return table[name]['tiles']
  return None


def choose(implementation: str, kernel: str, shape: Shape, candidates: Sequence[Any]) -> Any:
  """The tabulated candidate for the target, or the first; entries that are no longer candidates are ignored."""
  found = best(target().kind, implementation, kernel, shape)
  return next((tiles for tiles in candidates if _as_dict(tiles) == found), candidates[0])


def save(entries: dict[str, dict], path: pathlib.Path | None = None) -> pathlib.Path:
  """Adds entries to a table, by default the user's, atomically: readers see the old file or the new one."""
  path = path or user_table()
  _read.cache_clear()
  table = dict(sorted({**_read(path), **entries}.items()))
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ',\n'.join(f'{json.dumps(name)}: {json.dumps(entry)}' for name, entry in table.items())
  (new := path.with_name(f'{path.name}.{os.getpid()}')).write_text('{\n' + lines + '\n}\n')
  os.replace(new, path)
  _read.cache_clear()
  return path


@functools.cache
def _read(path):
  try:
    table = json.loads(path.read_text())
    if not all(isinstance(entry['tiles'], dict) for entry in table.values()):
      raise TypeError('an entry has no tiles')
    return table
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(f'{path} is not a valid table of tile sizes ({error}). Delete it and tune again.') from None


def _as_dict(tiles: Any) -> dict[str, int]:
  return tiles._asdict() if hasattr(tiles, '_asdict') else dataclasses.asdict(tiles)


# ---- Measuring.


def measure(run: Callable[[], Any]) -> float:
  """Seconds per call, averaged over several calls in flight at once."""
  start = time.perf_counter()
  for _ in range(_CALLS):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / _CALLS


def tune(implementation: str, layer: SparseLayer, *, kernels: Sequence[str] = KERNELS,
         measure: Callable[[Callable[[], Any]], float] = measure) -> dict[str, dict]:
  """Times every candidate for the matmuls of a layer on the local device. Writes nothing: see `save`.

  Candidates take turns, so that a device that slows down affects them all; the smallest median of 9 turns wins. Inputs
  are normal, group sizes multinomial.

  Args:
    implementation: one of `MODULES`.
    layer: rows, experts, widths and dtype.
    kernels: some of `KERNELS`.
    measure: returns the seconds per call.

  Returns:
    Entries of a table, {key: {'tiles': {..}, 'measured': True, 'microseconds': ..}}.

  Raises:
    ConfigError: the implementation has no tiles, cannot run the layer on the device, or none of its tiles compile.
  """
  module, device, entries = _module(implementation), target(), {}
  rows, sizes = _rows_in_groups(layer, module.IMPLEMENTATION.row_multiple)
  work = list(_work(module, layer, kernels))
  for _, shape, _ in work:
    if why_not := module.IMPLEMENTATION.limit(device, shape):
      raise ConfigError(f'{implementation} cannot be tuned here. {why_not}')
  for kernel, shape, options in work:
    title = f'{kernel} {shape.inner}x{shape.outer}'
    runs = _runs(module.IMPLEMENTATION, kernel, shape._replace(rows=rows), sizes, options)
    seconds = _race(runs, len(options), measure, title)
    if not seconds:
      raise ConfigError(f'None of {len(options)} candidates of {implementation} for {title} runs on {device.kind}.')
    fastest = min(seconds, key=lambda number: seconds[number])
    entries[key(device.kind, implementation, kernel, shape)] = dict(
        tiles=_as_dict(options[fastest]), measured=True, microseconds=round(1e6 * seconds[fastest], 1))
  return entries


def untuned(implementation: str, kind: str, dtype: str = 'bfloat16') -> dict[str, dict]:
  """Entries for `LAYERS` with each kernel's best guess, marked as not measured.

  The shipped table starts from these: `save(untuned('triton', 'NVIDIA A100-SXM4-80GB'), SHIPPED)`.
  """
  module = _module(implementation)
  return {key(kind, implementation, kernel, shape): dict(tiles=_as_dict(options[0]), measured=False)
          for layer in LAYERS.values()
          for kernel, shape, options in _work(module, layer._replace(dtype=dtype), KERNELS)}


def _module(implementation: str) -> Any:
  module = importlib.import_module(MODULES[implementation]) if implementation in MODULES else None
  if not hasattr(module, 'candidates'):
    raise ConfigError(f'{implementation} has no tile sizes to choose from: a tunable module defines '
                      f'candidates(kernel, shape) and is one of {", ".join(MODULES)}.')
  return module


def _work(module, layer, kernels) -> Iterator[tuple[str, Shape, list]]:
  # The first matmul of an expert may be fused with its activation; the second has no activation.
  first, second = layer.shapes(module.IMPLEMENTATION.row_multiple)
  for shape in (first, second):
    for kernel in kernels:
      if kernel != 'up' or (shape is first and module.IMPLEMENTATION.up):
        yield kernel, shape, module.candidates(kernel, shape)


def _rows_in_groups(layer, row_multiple):
  # Padded number of rows and group sizes.
  sizes = np.random.RandomState(0).multinomial(layer.rows, np.full(layer.experts, 1 / layer.experts)).astype(np.int32)
  if row_multiple == 1:
    return layer.rows, sizes
  padded = padding.pad_groups(jnp.asarray(sizes), layer.rows, row_multiple)[0]
  return padding.padded_rows(layer.rows, layer.experts, row_multiple), padded


def _runs(implementation: Implementation, kernel, shape, sizes, options) -> Iterator[Callable | None]:
  # A compiled call per candidate, on the same inputs; None if it does not run.
  up: Any = implementation.up  # is there wherever it has candidates
  normal = lambda n, *size: jax.random.normal(jax.random.key(n), size, jnp.float32).astype(shape.dtype)
  x, dy = normal(0, shape.rows, shape.inner), normal(1, shape.rows, shape.outer)
  matrix = lambda n: normal(n, shape.groups, shape.inner, shape.outer)
  function, arguments = {
      'matmul': lambda: (implementation.matmul, (x, matrix(2), sizes)),
      'transposed': lambda: (functools.partial(implementation.matmul, transpose=True), (dy, matrix(2), sizes)),
      'weight_gradient': lambda: (implementation.weight_gradient, (x, dy, sizes)),
      'up': lambda: (functools.partial(up, activation='swiglu'), (x, matrix(2), matrix(3), sizes)),
  }[kernel]()
  for tiles in options:
    try:
      compiled = jax.jit(functools.partial(function, tiles=tiles)).lower(*arguments).compile()
      jax.block_until_ready(compiled(*arguments))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
      tqdm.write(f'{tiles} does not run: {str(error).splitlines()[0]}')
      yield None
    else:
      yield functools.partial(compiled, *arguments)


def _race(runs, total, measure, title) -> dict[int, float]:
  # Median seconds by candidate index.
  runs = {n: run for n, run in enumerate(tqdm(runs, f'{title}: compile', total)) if run}
  seconds = {n: [] for n in runs}
  for _ in tqdm(range(_TURNS), f'{title}: measure'):
    for n, run in runs.items():
      seconds[n].append(measure(run))
  return {n: statistics.median(times) for n, times in seconds.items()}


def main() -> None:
  """The command."""
  flags = command_line.Parser('moejax.kernels.tuning', __doc__)
  flags.add_argument('--implementation', choices=MODULES, default='pallas_gpu', help='the kernels to tune')
  flags.add_argument('--rows', metavar='N', type=_count, help='tokens in a batch times experts per token')
  flags.add_argument('--experts', metavar='N', type=_count, help='number of experts on the device')
  flags.add_argument('--dim', metavar='N', type=_count, help='width of the model')
  flags.add_argument('--hidden', metavar='N', type=_count, help='width of an expert')
  flags.add_argument('--dtype', choices=('bfloat16', 'float16', 'float32'), default='bfloat16',
                     help='dtype of rows and matrices')
  given = flags.parse(needs=('rows', 'experts', 'dim', 'hidden'))
  entries = tune(given.implementation, SparseLayer(given.rows, given.experts, given.dim, given.hidden, given.dtype))
  for name, entry in entries.items():
    print(f'{name}: {entry["tiles"]}, {entry["microseconds"]} us')
  print(f'Written to {save(entries)}.')


def _count(text):
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is not a positive int')
  return int(text)


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
