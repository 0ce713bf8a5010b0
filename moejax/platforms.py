"""Keeps JAX from loading plugins of accelerators this machine lacks: each would print why it found no device."""
import ctypes
import importlib.util
import os
import pkgutil
import sys
from importlib import metadata
from pathlib import Path



def choose() -> None:
  """Selects the CPU if JAX_PLATFORMS is unset and no installed plugin has a device. Call it before jax finds devices.

  The extra `compile` installs the compilers of TPUs and NVIDIA GPUs on machines that have neither. If a plugin is
  unknown here, it may have a device, and the choice is left to jax.
  """
  if 'JAX_PLATFORMS' in os.environ:
    return
  found = plugins()
  known = {'libtpu': has_tpu, 'cuda': has_cuda}
  if found and found <= known.keys() and not any(known[name]() for name in found):
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:  # jax has read its environment already
      sys.modules['jax'].config.update('jax_platforms', 'cpu')


def plugins() -> set[str]:
  """Installed plugins besides the CPU: 'libtpu', 'cuda', and others by their own names."""
  names = {point.name for point in metadata.entry_points(group='jax_plugins')}
  if spec := importlib.util.find_spec('jax_plugins'):
    names |= {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)}
  return ({'cuda' if name.startswith('xla_cuda') else name for name in names} |
          ({'libtpu'} if importlib.util.find_spec('libtpu') else set()))


def has_tpu() -> bool:
  """Whether there is a PCI device made by Google: a TPU, or a network card of its cloud."""
  return any(path.read_text().strip() == '0x1ae0' for path in Path('/sys/bus/pci/devices').glob('*/vendor'))


def has_cuda() -> bool:
  """Whether there is an NVIDIA device, or the driver library, without which CUDA finds no device."""
  if any(Path('/dev').glob('nvidia*')):
    return True
  try:
    ctypes.CDLL('libcuda.so.1')
  except OSError:
    return False
  return True
