"""What a kernel is being traced for: the machine at hand, or one that is only described."""
import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax

Platform = Literal['cpu', 'gpu', 'tpu']
_interpreted: contextvars.ContextVar[Platform | None] = contextvars.ContextVar('interpreted', default=None)


class Target(NamedTuple):
  """A device that programs are made for.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: as its maker calls it, e.g. 'NVIDIA H100 80GB HBM3' or 'TPU v5 lite'.
    interpret: Pallas kernels for `platform` are interpreted on this machine's CPU: slow, and right or wrong all the same.
  """
  platform: Platform
  kind: str
  interpret: bool = False


def target() -> Target:
  """The interpreted platform, the device of the active abstract mesh (ahead-of-time compilation), or the one at hand."""
  if platform := _interpreted.get():
    return Target(platform, 'interpreted', interpret=True)
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  platform: Any = getattr(device, 'platform', None) or jax.default_backend()
  return Target('gpu' if platform in ('cuda', 'rocm') else platform, device.device_kind)


@contextlib.contextmanager
def interpreted(platform: Platform) -> Iterator[None]:
  """Traces Pallas kernels for `platform` so that they run on a CPU. What is jitted inside stays interpreted."""
  token = _interpreted.set(platform)
  try:
    yield
  finally:
    _interpreted.reset(token)
