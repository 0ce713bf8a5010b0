"""The target of a kernel being traced: the current machine, or one that is only described."""
import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax

Platform = Literal['cpu', 'gpu', 'tpu']
_interpreted: contextvars.ContextVar[Platform | None] = contextvars.ContextVar('interpreted', default=None)


class Target(NamedTuple):
  """A device to compile for.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: its product name, e.g. 'NVIDIA H100 80GB HBM3' or 'TPU v5 lite'.
    interpret: whether Pallas kernels for `platform` are interpreted on this machine's CPU: slow, with the same results.
  """
  platform: Platform
  kind: str
  interpret: bool = False


def target() -> Target:
  """The interpreted platform, the device of the active abstract mesh (compiling ahead of time), or the local device."""
  if platform := _interpreted.get():
    return Target(platform, 'interpreted', interpret=True)
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  platform: Any = getattr(device, 'platform', None) or jax.default_backend()
  return Target('gpu' if platform in ('cuda', 'rocm') else platform, device.device_kind)


@contextlib.contextmanager
def interpreted(platform: Platform) -> Iterator[None]:
  """Traces Pallas kernels for `platform` to run interpreted on a CPU. Functions jitted inside stay interpreted."""
  token = _interpreted.set(platform)
  try:
    yield
  finally:
    _interpreted.reset(token)
