"""Properties of chips, for estimates of memory and time.

Sources. bfloat16 peaks and memory bandwidths of TPUs: `jax.experimental.pallas.tpu.get_tpu_info_for_chip` of jax 0.12.
Memory of TPUs: the limit that their compiler (libtpu 0.0.52) reports when a program exceeds it; it reserves the rest of
16, 32, 95 and 32 GiB. Links: Austin et al., How To Scale Your Model (2025), TPU interconnect, one way.
H100: NVIDIA H100 SXM data sheet (dense peak), half of NVLink's bidirectional 900 GB/s, and one 400 Gb/s port per GPU
between hosts, as in DGX H100; its memory is `device_memory_size` of XLA's description.
"""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, with all its cores.

  Attributes:
    kind: `jax.Device.device_kind`.
    memory: bytes of high-bandwidth memory that a program may use.
    peak: bfloat16 FLOP/s.
    bandwidth: bytes/s of high-bandwidth memory.
    link: bytes/s one way: of one link of a TPU's torus, or of a GPU to all others of its host together.
    network: bytes/s between hosts; None if there are only links.
    ring: minimum length at which a side of a TPU's torus is closed to a ring.
  """
  kind: str
  memory: int
  peak: float
  bandwidth: float
  link: float
  network: float | None = None
  ring: int | None = None


GIB = 2**30
CHIPS = {
    'v4': Chip('TPU v4', int(30.75 * GIB), 2.75e14, 1.23e12, link=4.5e10, ring=4),
    'v5e': Chip('TPU v5 lite', int(15.75 * GIB), 1.97e14, 8.2e11, link=4.5e10, ring=16),
    'v5p': Chip('TPU v5', int(95.73 * GIB), 4.59e14, 2.46e12, link=9e10, ring=4),
    'v6e': Chip('TPU v6 lite', int(31.24 * GIB), 9.2e14, 1.64e12, link=9e10, ring=16),
    'h100': Chip('NVIDIA H100 80GB HBM3', 84942979072, 9.89e14, 3.35e12, link=4.5e11, network=5e10),
}


def of_kind(device_kind: str) -> Chip | None:
  """The chip that a device with this `jax.Device.device_kind` is; None where the table does not have it."""
  return next((chip for chip in CHIPS.values() if chip.kind == device_kind), None)
