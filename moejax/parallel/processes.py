"""Several processes: how they connect, which rows of a batch each one loads, and how they agree.

A run of several processes is one program: all call the same functions in the same order, because every computation on
the mesh involves them all. Only `jax.process_index() == 0` prints, and writes anything other than arrays.
"""
import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.parallel import rules

# Seconds without a heartbeat after which a process counts as dead. Heartbeats come from a thread that never blocks.
_HEARTBEAT = 20

# ---- connecting -----------------------------------------------------------------------------------------------------


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins the other processes of this run, if any. Call it before anything uses a jax device.

  Without arguments `jax.distributed` reads them from the cluster that `cluster` detects. Without a cluster, or with
  `num_processes` 1, it does nothing: a single process with all devices of its machine needs no coordinator.
  A given coordinator listens only at that address, or at JAX_COORDINATOR_BIND_ADDRESS (for addresses that are not the
  machine's own: behind a Kubernetes service, or in a container).

  Raises:
    ConfigError: only some of the arguments are given, their values are invalid, or the other processes were not found.
  """
  arguments = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
  given = {name: value for name, value in arguments.items() if value is not None}
  found = cluster(os.environ)
  if num_processes == 1 or (not given and found is None):
    return
  if given:
    _check(given, arguments)
  # The training loop handles stopping, also for Ctrl-C; with this service SIGTERM would have no effect outside the
  # loop.
  jax.config.update('jax_enable_preemption_service', False)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT,
                               coordinator_bind_address=os.environ.get('JAX_COORDINATOR_BIND_ADDRESS', coordinator))
  except (RuntimeError, ValueError) as error:
    raise ConfigError(f'The other processes of this run, given by {"--coordinator" if given else found}, were not '
                      f'found: {error} For a single process set --num_processes=1; otherwise give --coordinator, '
                      '--num_processes and --process_id.') from error


def cluster(environment: Mapping[str, str]) -> str | None:
  """The cluster that started this process as one of several, by its environment variables; None for a single process.

  `jax.distributed.initialize` reads these environments by itself. It also detects some of them for a single process
  (one task in an interactive SLURM job, any Kubernetes pod), which has nothing to join: those give None.
  """
  def several(name, separator=None):
    value = environment.get(name, '')
    return len(value.split(separator)) > 1 if separator else value.isdigit() and int(value) > 1

  if several('OMPI_COMM_WORLD_SIZE'):
    return 'Open MPI'
  if several('SLURM_NTASKS') and 'SLURM_STEP_NODELIST' in environment:
    return 'SLURM'
  if (any(several(name, ',') for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')) or
      several('MEGASCALE_NUM_SLICES') or 'TPU_PROCESS_ADDRESSES_PATH' in environment):
    return 'GKE'
  # Importing jax sets the first of these if it finds TPU chips, and the second if it finds none.
  alone = {'TPU_SKIP_MDS_QUERY', 'TPU_WORKER_HOSTNAMES'} & environment.keys()
  if environment.get('TPU_ML_PLATFORM') == 'JAX' and not alone:
    return 'Cloud TPU'
  if 'KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment:
    return 'Kubernetes'
  return None


def _check(given, arguments):
  missing = [f'--{name}' for name in arguments if name not in given]
  if missing:
    raise ConfigError(f'--{" and --".join(given)} without {" and ".join(missing)}: outside a cluster, processes need '
                      'all three, e.g. --coordinator=localhost:1234 --num_processes=2 --process_id=0.')
  host, _, port = given['coordinator'].rpartition(':')
  if not host or not port.isdigit():
    raise ConfigError(f'--coordinator must be host:port, e.g. localhost:1234, not {given["coordinator"]!r}.')
  if not 0 <= given['process_id'] < given['num_processes']:
    raise ConfigError(f'--process_id must be between 0 and --num_processes - 1 = {given["num_processes"] - 1}, '
                      f'not {given["process_id"]}.')


# ---- batches --------------------------------------------------------------------------------------------------------


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """<int>[n], increasing: the rows of a batch on this process's devices.

  If the batch is not sharded over all processes (a model replica spans several), several have the same rows.
  """
  count = batch_size // rules.batch_shards(mesh)
  return np.concatenate([shard * count + np.arange(count) for shard in _shards_here(mesh)])


def place(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """The global batch on the mesh, from its `local_rows` in every process: `{name: [n, ...]}` to `{name: [B, ...]}`."""
  sharding, shards, here = rules.batch_sharding(mesh), rules.batch_shards(mesh), _shards_here(mesh)

  def array(values):
    count = len(values) // len(here)
    def part(index):
      start = here.index((index[0].start or 0) // count) * count
      return np.asarray(values[start:start + count])
    return jax.make_array_from_callback((shards * count, *values.shape[1:]), sharding, part)
  return {name: array(values) for name, values in batch.items()}


@functools.lru_cache
def _shards_here(mesh):
  """The shards of the batch on this process's devices, in order."""
  shards = rules.batch_shards(mesh)
  indices: Any = rules.batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
  return sorted({index[0].indices(shards)[0] for index in indices})


def spread(tree: Tree, shardings: Tree) -> Tree:
  """Shards arrays that every process has in full over the mesh of `shardings`."""
  def array(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  return jax.tree.map(array, tree, shardings)


# ---- agreeing -------------------------------------------------------------------------------------------------------


def by_the_first(say: Callable[[str], None]) -> Callable[[str], None]:
  """`say` in the first process; the others print nothing."""
  return say if jax.process_index() == 0 else lambda line: None


def largest(number: int) -> int:
  """The maximum of `number` over the processes."""
  return number if jax.process_count() == 1 else int(_largest(number))


class LargestBefore:
  """The maximum over the processes of the number in the previous call; 0 in the first call.

  The previous maximum is already computed, so no process waits. A single process gets the number of this call.
  """

  def __init__(self):
    self._before = 0

  def __call__(self, number: int) -> int:
    if jax.process_count() == 1:
      return number
    before, self._before = self._before, _largest(number)
    return int(before)


def _largest(number: int) -> jax.Array:
  sharding, function = _largest_program()
  parts = [jax.device_put(np.array([number], np.int32), device) for device in sharding.addressable_devices]
  return function(jax.make_array_from_single_device_arrays((sharding.num_devices,), sharding, parts))


@functools.cache
def _largest_program():
  mesh = Mesh(np.asarray(jax.devices()), ('device',))
  return (NamedSharding(mesh, PartitionSpec('device')),
          jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec())))


def union(items: dict) -> dict:
  """The union of the processes' dicts, whose values must be JSON.

  Raises:
    RuntimeError: processes have different values for the same key.
  """
  if jax.process_count() == 1:
    return items
  text = json.dumps(items).encode()
  padded = np.frombuffer(text.ljust(largest(len(text))), np.uint8)
  united = {}
  for row in multihost_utils.process_allgather(padded):
    for name, value in json.loads(row.tobytes()).items():
      if united.setdefault(name, value) != value:
        raise RuntimeError(f'processes disagree about {name!r}: {united[name]!r} and {value!r}.')
  return united


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """An exception in one process is raised in all, so that none waits for it forever.

  Raises:
    RuntimeError: another process failed to do `what`.
  """
  error = None
  try:
    yield
  except Exception as caught:  # noqa: BLE001  (the others must know of any exception)
    error = caught
  if largest(error is not None):
    raise error or RuntimeError(f'another process could not {what}')


def compiled(function: Callable, *arguments) -> Callable:
  """Compiles the jitted `function` for these arguments (or their shapes) in all processes before any of them runs it.

  Collectives time out (gloo after 30 s) sooner than other processes may finish compiling.
  """
  if jax.process_count() == 1:
    return function
  program = function.lower(*arguments).compile()
  wait('all have compiled')
  return program


def wait(what: str, minutes: int = 60) -> None:
  """A barrier: returns when all processes reach `what`. No collective: devices may be busy or not yet connected."""
  if jax.process_count() > 1:
    multihost.get_barrier_sync_fn()(key=f'moejax {next(_waits)}: {what}', timeout_ms=minutes * 60_000)


_waits = itertools.count()  # equal in all processes, because all wait in the same order
