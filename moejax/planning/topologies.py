"""Descriptions of hardware that need not be present: devices to compile for, by name.

    load('v5e:16x16')   256 chips of a TPU v5e pod, with the compiler of libtpu
    load('h100:8x8')    8 hosts of 8 H100, with the compiler of jax's CUDA plugin and ptxas

Both compilers come with the extra `compile`, run on any Linux machine, and need neither TPU nor GPU.
"""
import dataclasses
import importlib.util
import math
import os
import re
import shutil
from typing import Any

import jax
from jax.experimental import topologies as described

from moejax.config import ConfigError
from moejax.parallel.chips import CHIPS, Chip

# XLA's description of an H100 SXM.
H100 = '''gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"'''
# Available shapes, smallest first.
_TWO_DIMENSIONS = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_THREE_DIMENSIONS = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16')
SHAPES = dict(v5e=_TWO_DIMENSIONS, v6e=_TWO_DIMENSIONS, v4=_THREE_DIMENSIONS, v5p=_THREE_DIMENSIONS,
              h100=('1x1', '1x2', '1x4', '1x8', '2x8', '4x8', '8x8', '16x8', '32x8', '64x8'))
# Keeps libtpu from querying a cloud for chips and neighbours, and from locking chips, which do not exist here.
_ALONE = dict(TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5litepod-8',
              ALLOW_MULTIPLE_LIBTPU_LOAD='1')

Device = Any  # jax.Device, which is a variable to type checkers


@dataclasses.dataclass(frozen=True)
class Topology:
  """Connected chips.

  Attributes:
    name: as given to `load`, e.g. 'v5e:16x16'.
    chip: properties of each chip.
    shape: sides of a TPU's torus, or hosts and GPUs per host.
    devices: one per chip, to build a mesh.
  """
  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: tuple[Device, ...]


def has_ragged_all_to_all(name: str) -> bool:
  """Whether the topology's compiler supports it: libtpu 0.0.52 does not for v5e with more than 16 chips."""
  return not name.startswith('v5e:') or chips(name) <= 16

def shape(name: str) -> tuple[int, ...]:
  """The sides in the name of a topology."""
  return tuple(map(int, name.partition(':')[2].split('x')))


def chips(name: str) -> int:
  """The number of chips of the topology."""
  return math.prod(shape(name))


def by_size(topology: Topology) -> list[tuple[str, Chip]]:
  """Candidate topologies with more memory: larger ones of the same chip, then all others, smallest first."""
  own = [(f'{name}:{sides}', chip) for name, chip in CHIPS.items() if chip.kind == topology.chip.kind
         for sides in SHAPES[name] if chips(f':{sides}') > len(topology.devices)]
  others = [(f'{name}:{sides}', chip) for name, chip in CHIPS.items() if chip.kind != topology.chip.kind
            for sides in SHAPES[name]]
  return own + sorted(others, key=lambda other: (chips(other[0]), other[1].memory))


def load(name: str) -> Topology:
  """The devices of `name`: <chip>:<sides>.

  Raises:
    ConfigError: there is no such chip or shape, or its compiler is not installed.
  """
  chip, _, sides = name.partition(':')
  if chip not in CHIPS:
    raise ConfigError(f'--topology={name}: there is no chip {chip!r}. Known: {", ".join(CHIPS)}; a topology is e.g. '
                      'v5e:16x16, v5p:4x4x8 or h100:8x8.')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', sides):
    raise ConfigError(f'--topology={name}: {chip}: must be followed by its sides, e.g. '
                      f'{"h100:8x8 (hosts x GPUs per host)" if chip == "h100" else "v5e:16x16 or v5p:4x4x8"}.')
  sizes = shape(name)
  devices = _gpus(name, sizes) if chip == 'h100' else _tpus(name, chip, sides)
  if len(devices) != math.prod(sizes):
    raise RuntimeError(f'{name} has {len(devices)} devices, not one for each of {math.prod(sizes)} chips.')
  return Topology(name, CHIPS[chip], sizes, tuple(devices))


def missing(name: str) -> str | None:
  """What must be installed to compile for the topology `name`, in words; None if nothing."""
  if name.startswith('h100'):
    # `find_spec` raises if the parent package does not exist.
    plugins = importlib.util.find_spec('jax_plugins') and any(
        importlib.util.find_spec(f'jax_plugins.xla_cuda{version}') for version in (12, 13))
    if not plugins:
      return "jax's CUDA plugin (pip install -e '.[compile]')"
    return None if shutil.which('ptxas') else 'ptxas from the CUDA toolkit on the PATH'
  return None if importlib.util.find_spec('libtpu') else "libtpu (pip install -e '.[compile]')"


def _tpus(name: str, chip: str, sides: str) -> list:
  for variable, value in _ALONE.items():
    os.environ.setdefault(variable, value)
  # A v4 chip has two cores but is one jax device.
  options = dict(chip_config_name='megacore') if chip == 'v4' else {}
  return _described(name, f'{chip}:{sides}', 'tpu', **options)


def _gpus(name: str, shape: tuple[int, ...]) -> list:
  if len(shape) != 2:
    raise ConfigError(f'--topology={name}: for GPUs give hosts x GPUs per host, e.g. h100:8x8.')
  hosts, gpus = shape
  return _described(name, '', 'cuda', target_config=H100, topology=f'{hosts}x1x{gpus}')


def _described(name: str, *arguments, **options) -> list:
  if lack := missing(name):
    raise ConfigError(f'--topology={name}: compiling for it needs {lack}.')
  try:
    return described.get_topology_desc(*arguments, **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f'--topology={name} is not a valid shape: {str(error).splitlines()[0]}.') from None
