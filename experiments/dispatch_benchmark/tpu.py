"""Grouped matmuls compiled for absent TPUs, compared with megablox: `python -m experiments.dispatch_benchmark.tpu`.

Each product is compiled for one chip of each generation by its real compiler (libtpu); nothing runs. Times are
therefore ESTIMATES: the sum over a kernel's steps of the maximum of FLOPs / peak and bytes / bandwidth, where the bytes
are those copied during the step: the next step's inputs, and results. Tiles of gradients are written during all steps
of the next expert; ours also reads the next expert's matrix during all steps of an expert. Other costs of a step are
ignored.

The steps are those of the kernels' grids for one draw of a uniform router's group sizes. The compiled program's own
cost estimate (which assumes that every row is used) is saved too. For megablox we take, of many tilings, the one with
the best estimate that the compiler accepts.
"""
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from experiments import runner
from moejax.kernels import padding, pallas_tpu, tpu_tiles
from moejax.parallel.chips import CHIPS, Chip
from moejax.planning import topologies

PATH = pathlib.Path(__file__).with_suffix('.json')
PRODUCTS = 'forward', 'dX', 'dW', 'up'


# We compile for one chip of each generation; a topology has at least the chips of one host.
TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}


class Experts(NamedTuple):
  """M rows in E groups, times matrices [D, F]."""
  M: int
  E: int
  D: int
  F: int

  def group_sizes(self) -> np.ndarray:
    """Group sizes of a uniform router."""
    return np.random.RandomState(0).multinomial(self.M, np.ones(self.E) / self.E)


# 4096 tokens, 2 of 8 experts with the widths of Mixtral 8x7B; and 8192 tokens, 8 of 64 experts of OLMoE.
EXPERTS = {'8 of 4096 x 14336': Experts(8192, 8, 4096, 14336), '64 of 2048 x 1024': Experts(65536, 64, 2048, 1024)}


class Work(NamedTuple):
  """A product's demands on a chip, and its estimated time."""
  flops: int
  bytes: int
  steps: int
  seconds: float


def work(chip: Chip, flops: int, copied: np.ndarray, times: int = 1) -> Work:
  """Adds `times` the cost of steps of `flops` each that copy `copied` bytes <int>[steps]."""
  seconds = np.maximum(flops / chip.peak, copied / chip.bandwidth).sum()
  return Work(times * flops * len(copied), times * round(copied.sum()), times * len(copied), times * float(seconds))


def compile_for(chip: Chip, function, *shapes: jax.ShapeDtypeStruct):
  """Compiles `function` for the chip; raises the compiler's errors."""
  name = next(name for name in TOPOLOGIES if CHIPS[name] == chip)
  mesh = jax.sharding.Mesh(topologies.load(TOPOLOGIES[name]).devices[:1], ('chip',))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for a in shapes]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).lower(*shapes).compile()


def ours(product: str, experts: Experts, chip: Chip):
  """The function, its arguments and its tiles."""
  M, E, D, F = experts._replace(M=padding.padded_rows(experts.M, experts.E, tpu_tiles.ROWS))
  x, dy, w, sizes = _arguments(M, E, D, F)
  if product == 'dW':
    return pallas_tpu.weight_gradient, (x, dy, sizes), tpu_tiles.gradient_tiles(chip.kind, D, F, x.dtype)
  if product == 'dX':
    function = lambda dy, w, sizes: pallas_tpu.matmul(dy, w, sizes, transpose=True)
    return function, (dy, w, sizes), tpu_tiles.row_tiles(chip.kind, F, D, x.dtype)
  if product == 'forward':
    return pallas_tpu.matmul, (x, w, sizes), tpu_tiles.row_tiles(chip.kind, D, F, x.dtype)
  function = lambda x, wi, wg, sizes: pallas_tpu.up(x, wi, wg, sizes, 'swiglu')
  return function, (x, w, w, sizes), tpu_tiles.row_tiles(chip.kind, D, F, x.dtype, matrices=2, outputs=3)


def our_work(product: str, experts: Experts, chip: Chip, tiles: tpu_tiles.TPUTiles, group_sizes: np.ndarray) -> Work:
  """The work of our kernel: every block of rows belongs to one expert, and every expert has at least one."""
  rows, (_, _, D, F) = tpu_tiles.ROWS, experts
  blocks = np.maximum(-(-group_sizes // rows), 1)
  if product == 'dW':
    copied = 2 * rows * (tiles.inner + tiles.outer) + 4 * tiles.inner * tiles.outer / np.repeat(blocks, blocks)
    return work(chip, 2 * rows * tiles.inner * tiles.outer, copied, (D // tiles.inner) * (F // tiles.outer))
  inner, outer = (F, D) if product == 'dX' else (D, F)
  matrices, outputs = (2, 3) if product == 'up' else (1, 1)
  parts, columns = inner // tiles.inner, outer // tiles.outer
  flops, written = 2 * rows * tiles.inner * tiles.outer * matrices, 2 * rows * tiles.outer * outputs
  if not tiles.resident:
    copied = np.full((blocks.sum(), parts), 2 * tiles.inner * (rows + matrices * tiles.outer))
    copied[:, 0] += written
    return work(chip, flops, copied.ravel(), columns)
  # The next expert's matrix is read during all steps of an expert.
  steps = blocks * parts
  a_step = 2 * rows * tiles.inner + written / parts + 2 * matrices * inner * tiles.outer / np.repeat(steps, steps)
  return work(chip, flops, a_step, columns)


def megablox(product: str, experts: Experts, tiling: tuple[int, int, int]):
  """The function and its arguments."""
  x, dy, w, sizes = _arguments(*experts)
  if product == 'dW':
    return (lambda x, dy, sizes: tgmm(x.swapaxes(0, 1), dy, sizes, jnp.float32, tiling)), (x, dy, sizes)
  if product == 'dX':
    return (lambda dy, w, sizes: gmm(dy, w, sizes, jnp.bfloat16, tiling, transpose_rhs=True)), (dy, w, sizes)
  forward = lambda x, w, sizes: gmm(x, w, sizes, jnp.bfloat16, tiling)
  if product == 'forward':
    return forward, (x, w, sizes)

  def up(x, wi, wg, sizes):
    zi, zg = forward(x, wi, sizes), forward(x, wg, sizes)
    return (jax.nn.silu(zg.astype(jnp.float32)) * zi).astype(x.dtype), zi, zg
  return up, (x, w, w, sizes)


def megablox_work(product: str, experts: Experts, chip: Chip, tiling: tuple[int, int, int],
                  group_sizes: np.ndarray) -> Work:
  """The work on a grid (columns, visits, contraction) or (columns, rows of dW, visits); a visit is a group's tile."""
  M, _, D, F = experts
  tm, tk, tn = tiling
  start = np.cumsum(group_sizes) - group_sizes
  # The gradient of an empty group is written too.
  first, last = start // tm, -(-(start + group_sizes) // tm)
  count = np.where(group_sizes > 0, last - first, product == 'dW')
  group = np.repeat(np.arange(len(group_sizes)), count)
  tile = np.concatenate([np.arange(a, a + n) for a, n in zip(first, count)])
  changes = lambda a: np.append(True, a[1:] != a[:-1])
  if product == 'dW':
    copied = 2 * tm * (tk + tn) * changes(tile) + 4 * tk * tn / np.repeat(count, count)
    return work(chip, 2 * tm * tk * tn, copied, (D // tk) * (F // tn))
  K, N = (F, D) if product == 'dX' else (D, F)
  parts = K // tk
  read = 2 * tk * (tm * changes(tile) + tn * changes(group)) if parts == 1 else np.full(len(tile), 2 * tk * (tm + tn))
  copied = np.repeat(read[:, None], parts, axis=1)
  copied[:, 0] += 2 * tm * tn * changes(tile)
  product_work = work(chip, 2 * tm * tk * tn, copied.ravel(), N // tn)
  if product == 'up':  # two products, and an activation that reads two arrays and writes one
    both, extra = [2 * n for n in product_work], 2 * 3 * M * N
    return Work(both[0], both[1] + extra, both[2], both[3] + extra / chip.bandwidth)
  return product_work


def tilings(product: str, experts: Experts, chip: Chip) -> list[tuple[int, int, int]]:
  """Tilings for megablox, best estimate first; of equal ones, the fewest steps."""
  K, N = (experts.F, experts.D) if product == 'dX' else (experts.D, experts.F)
  sides = lambda length: [n for n in (128, 256, 512, 1024, 2048, 3584, 4096) if n <= length and length % n == 0]
  buffers = lambda tm, tk, tn: (4 * tm * (tk + tn) + 12 * tk * tn if product == 'dW' else
                                4 * (tm * tk + tk * tn + tm * tn) + 4 * tm * tn)
  able = [(tm, tk, tn) for tm in (128, 256, 512, 1024) for tk in sides(K) for tn in sides(N)
          if buffers(tm, tk, tn) <= 32 * 2**20 and tm * tk * tn <= 2**30]
  sizes = experts.group_sizes()
  estimates = {tiling: megablox_work(product, experts, chip, tiling, sizes) for tiling in able}
  return sorted(able, key=lambda tiling: (estimates[tiling].seconds, estimates[tiling].steps))


def measure(experts: Experts, product: str, chip: Chip, function, arguments, work: Work) -> dict:
  """Compiles, and collects the results."""
  start = time.process_time()
  compiled = compile_for(chip, function, *arguments)
  seconds, cost, memory = time.process_time() - start, compiled.cost_analysis(), compiled.memory_analysis()
  useful = 2 * experts.M * experts.D * experts.F * (2 if product == 'up' else 1)
  return dict(
      flops=int(work.flops), bytes=work.bytes, steps=work.steps, intensity=round(work.flops / work.bytes, 1),
      estimated_ms=round(1e3 * work.seconds, 4), estimated_share_of_peak=round(useful / chip.peak / work.seconds, 4),
      program=dict(flops=int(cost.get('flops', 0)), bytes_accessed=int(cost.get('bytes accessed', 0)),
                   temporary_bytes=memory.temp_size_in_bytes, argument_bytes=memory.argument_size_in_bytes,
                   output_bytes=memory.output_size_in_bytes, kernels=compiled.as_text().count('"tpu_custom_call"')),
      compile_cpu_seconds=round(seconds, 2))


def measure_ours(experts: Experts, product: str, chip: Chip) -> dict:
  """Our kernels, with their tiles for the chip."""
  function, arguments, tiles = ours(product, experts, chip)
  work = our_work(product, experts, chip, tiles, experts.group_sizes())
  return dict(tiles=tiles._asdict()) | measure(experts, product, chip, function, arguments, work)


def measure_megablox(experts: Experts, product: str, chip: Chip) -> dict:
  """megablox, with the best tiling that compiles."""
  for refused, tiling in enumerate(tilings(product, experts, chip)):
    try:
      work = megablox_work(product, experts, chip, tiling, experts.group_sizes())
      return dict(tiling=tiling, refused=refused) | measure(
          experts, product, chip, *megablox(product, experts, tiling), work)
    except jax.errors.JaxRuntimeError as error:
      if 'vmem' not in str(error):
        raise
  raise ValueError(f'No tiling of megablox compiles for {chip.kind}.')


def instructions(chip: str, product: str, rows: int) -> int:
  """Instructions scheduled by the compiler, in a fresh process, for a step of `rows` rows with a 2048 x 1024 matrix."""
  with tempfile.TemporaryDirectory() as folder:
    code = (f'from moejax.kernels import tpu_tiles; tpu_tiles.ROWS = {rows}; '
            f'from experiments.dispatch_benchmark import tpu; chip = tpu.CHIPS[{chip!r}]; '
            f'function, arguments, _ = tpu.ours({product!r}, tpu.Experts(8192, 8, 2048, 1024), chip); '
            'tpu.compile_for(chip, function, *arguments)')
    flags = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final'
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, cwd=runner.ROOT,
                   env=os.environ | dict(LIBTPU_INIT_ARGS=flags))
    kernel = 'weight_gradient' if product == 'dW' else 'grouped_matmul'
    schedule, = pathlib.Path(folder).glob(f'*{kernel}*final_hlo-static-per-bundle-utilization.txt')
    _, table = schedule.read_text().split('UTILIZATION:\n')
    return len(table.strip().splitlines())


def table(results: dict) -> str:
  """Shares of peak by chip, of moejax and megablox, as markdown."""
  chips = list(results['chips'])
  lines = [f'| experts | product | {" | ".join(chips)} |', '|---' * (len(chips) + 2) + '|']
  for experts, product in itertools.product(results['experts'], PRODUCTS):
    runs = {run['chip']: run for run in results['runs'] if (run['experts'], run['product']) == (experts, product)}
    cells = [f'{runs[chip]["ours"]["estimated_share_of_peak"]:.0%} / '
             f'{runs[chip]["megablox"]["estimated_share_of_peak"]:.0%}' for chip in chips]
    lines.append(f'| {experts} | {product} | {" | ".join(cells)} |')
  of = results['environment']
  return '\n'.join(lines) + (
      '\n\nEstimates, moejax / megablox: FLOPs that serve a token, as a share of peak, if each step of a kernel takes '
      f'the longer of its product and of its copies. Compiled by libtpu {of["libtpu"]}, run on no chip '
      f'(`{results["command"]}`, commit {of["commit"]}, jax {of["jax"]}).')


def main() -> None:
  """Compiles everything; writes tpu.json."""
  results = dict(command='python -m experiments.dispatch_benchmark.tpu',
                 environment=runner.environment() | dict(libtpu=metadata.version('libtpu')),
                 chips={name: dict(topology=topology, kind=CHIPS[name].kind, peak=CHIPS[name].peak,
                                   bandwidth=CHIPS[name].bandwidth) for name, topology in TOPOLOGIES.items()},
                 experts={name: experts._asdict() for name, experts in EXPERTS.items()}, runs=[], instructions=[])
  cases = list(itertools.product(TOPOLOGIES, EXPERTS.items(), PRODUCTS))
  for n, (chip_name, (experts_name, experts), product) in enumerate(cases, 1):
    chip = CHIPS[chip_name]
    run = dict(chip=chip_name, experts=experts_name, product=product, ours=measure_ours(experts, product, chip),
               megablox=measure_megablox(experts, product, chip))
    results['runs'].append(run)
    print(f'{n} of {len(cases)}: {chip_name}, {experts_name}, {product}: '
          f'estimates {run["ours"]["estimated_ms"]:.3f} ms, megablox {run["megablox"]["estimated_ms"]:.3f} ms; '
          f'compiled in {run["ours"]["compile_cpu_seconds"]:.0f} and {run["megablox"]["compile_cpu_seconds"]:.0f} s',
          flush=True)
  for chip, product, rows in itertools.product(('v5e', 'v6e'), ('forward', 'dX', 'dW'), (128, 256)):
    count = instructions(chip, product, rows)
    results['instructions'].append(dict(chip=chip, product=product, rows=rows, instructions=count))
    print(f'{chip}, {product}: {count} instructions for {rows} rows', flush=True)
  PATH.write_text(json.dumps(results, indent=1) + '\n')
  print(f'\n{table(results)}\n\nWritten: {PATH.relative_to(runner.ROOT)}')


def _arguments(M, E, D, F):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  return array(M, D), array(M, F), array(E, D, F), jax.ShapeDtypeStruct((E,), jnp.int32)


if __name__ == '__main__':
  main()
