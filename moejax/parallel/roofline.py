"""How long a step takes: an estimate from what a compiled program computes, reads and sends."""
import dataclasses
from collections.abc import Iterable, Sequence

import jax

from moejax.parallel.collectives import Collective
from moejax.parallel.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step: the longer of compute and memory, and then communication, which nothing hides.

  Attributes:
    compute: matrix products at the chip's bfloat16 peak.
    memory: bytes read and written at the bandwidth of its memory.
    communication: collectives one after the other, at the bandwidth of the links that each can use.
  """
  compute: float
  memory: float
  communication: float

  @property
  def step(self) -> float:
    """Seconds of the whole step."""
    return max(self.compute, self.memory) + self.communication


def estimate(topology: Topology, devices: Sequence[jax.Device], flops: float, traffic: float,
             collectives: Iterable[Collective]) -> Estimate:
  """For one chip: `flops` of its matrix products, `traffic` of its memory in bytes; `devices` in the mesh's order."""
  return Estimate(flops / topology.chip.peak, traffic / topology.chip.bandwidth,
                  sum(c.times * seconds(c, topology, devices) for c in collectives))


def assumptions(topology: Topology) -> list[str]:
  """What an estimate takes for granted, in sentences."""
  chip = topology.chip
  links = (f'links {chip.link / 1e9:.0f} GB/s each way; a group of chips uses the links along the sides of the torus '
           f'that it spans, both ways where a side is closed to a ring (from {chip.ring} chips)'
           if chip.network is None else
           f'NVLink {chip.link / 1e9:.0f} GB/s and network between hosts {chip.network / 1e9:.0f} GB/s, a GPU, one way')
  return [
      f'bfloat16 peak {chip.peak / 1e12:.0f} TFLOP/s, memory {chip.bandwidth / 1e12:.2f} TB/s; both are reached, and '
      'overlap each other fully.',
      f'{links[0].upper() + links[1:]}.',
      'Collectives overlap with nothing and add up; collectives that compilers run behind products take less.',
      'Matrix products are spread evenly over the chips; the time of everything else is the memory that it moves; '
      'arrays with room for the worst case are moved whole.',
      'Tokens choose experts evenly. Nothing was run: how far a real step is from this, only a run can tell.']


def seconds(collective: Collective, topology: Topology, devices: Sequence[jax.Device]) -> float:
  """Seconds of one run of a collective.

  An all-to-all has to bring bytes over several links: half of the bytes of one half of a side cross its middle, which
  is bytes * side / 4 over the links there. Source: How To Scale Your Model (2025), costs of collectives on a torus.
  """
  group, chip = [devices[i] for i in collective.group], topology.chip
  swaps = collective.kind in ('all-to-all', 'ragged-all-to-all')
  if chip.network is not None:
    hosts = len({device.process_index for device in group})
    if hosts == 1:
      return collective.sent / chip.link
    neighbours = len(group) // hosts
    # All GPUs of a host have a port of their own; what they gather together enters through all ports, once.
    outside = (collective.bytes * (len(group) - neighbours) / len(group) if swaps else
               collective.sent / max(neighbours, 1))
    return max(outside / chip.network, collective.sent / chip.link)
  sides = _sides(group, topology)
  if collective.kind == 'collective-permute':
    return collective.bytes / chip.link
  if swaps:
    return max(collective.bytes * side / 4 / links for side, links in sides) / chip.link
  return collective.sent / sum(links for _, links in sides) / chip.link


def _sides(group: Sequence[jax.Device], topology: Topology) -> list[tuple[int, int]]:
  """(chips, links out of each) along every side of the torus that a group spans."""
  sides = []
  for axis, length in enumerate(topology.shape):
    side = len({device.coords[axis] for device in group})
    if side > 1:
      sides.append((side, 2 if side == length >= topology.chip.ring else 1))
  return sides
