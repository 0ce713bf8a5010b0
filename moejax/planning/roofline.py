"""Roofline estimate of the time of a step, from the FLOPs, memory traffic and collectives of its compiled program."""
import dataclasses
import math
from collections.abc import Iterable, Sequence

from moejax.planning.collectives import Collective
from moejax.planning.topologies import Device, Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step: the maximum of compute and memory, plus communication without overlap.

  Attributes:
    compute: matrix products at the chip's bfloat16 peak.
    memory: bytes read and written at its memory bandwidth.
    communication: collectives in sequence, at the bandwidth of the links that each can use.
  """
  compute: float
  memory: float
  communication: float

  @property
  def step(self) -> float:
    """Seconds of the whole step."""
    return max(self.compute, self.memory) + self.communication


def estimate(topology: Topology, devices: Sequence[Device], flops: float, traffic: float,
             collectives: Iterable[Collective]) -> Estimate:
  """For one chip: `flops` of its matrix products, `traffic` of its memory in bytes; `devices` in the mesh's order."""
  return Estimate(flops / topology.chip.peak, traffic / topology.chip.bandwidth,
                  sum(c.times * seconds(c, topology, devices) for c in collectives))


def assumptions(topology: Topology) -> list[str]:
  """The assumptions of an estimate, in sentences."""
  chip = topology.chip
  links = (f'links {chip.link / 1e9:.0f} GB/s each way; a group of chips uses the links along the sides of the torus '
           f'it spans, both ways if a side is closed to a ring (from {chip.ring} chips)'
           if chip.network is None else
           f'NVLink {chip.link / 1e9:.0f} GB/s and network between hosts {chip.network / 1e9:.0f} GB/s per GPU one way')
  return [
      f'bfloat16 peak {chip.peak / 1e12:.0f} TFLOP/s, memory {chip.bandwidth / 1e12:.2f} TB/s; both are reached, and '
      'overlap fully.',
      f'{links[0].upper() + links[1:]}.',
      'Collectives do not overlap with anything; in practice compilers overlap some of them with products.',
      'Matrix products are spread evenly over the chips; all other operations cost only their memory traffic; '
      'arrays sized for the worst case are moved in full.',
      'Routing is balanced. Nothing was run: only a run can show how far a real step is from this.']


def seconds(collective: Collective, topology: Topology, devices: Sequence[Device]) -> float:
  """Seconds of one execution of a collective.

  In an all-to-all bytes pass several links: half of the bytes of one half of a side cross its middle, which is
  bytes * side / 4 over the links there. Source: How To Scale Your Model (2025), costs of collectives on a torus.
  """
  group, chip = [devices[i] for i in collective.group], topology.chip
  swaps = collective.kind in ('all-to-all', 'ragged-all-to-all')
  if chip.network is not None:
    hosts = len({device.process_index for device in group})
    if hosts == 1:
      return collective.sent / chip.link
    neighbours = len(group) // hosts
    # Each GPU of a host has its own port; data that they all need enters once, through all ports together.
    outside = (collective.bytes * (len(group) - neighbours) / len(group) if swaps else
               collective.sent / max(neighbours, 1))
    return max(outside / chip.network, collective.sent / chip.link)
  sides = _sides(group, topology)
  if collective.kind == 'collective-permute':
    return collective.bytes / chip.link
  if swaps:
    return max(collective.bytes * side / 4 / links for side, links in sides) / chip.link
  return collective.sent / sum(links for _, links in sides) / chip.link


def _sides(group: Sequence[Device], topology: Topology) -> list[tuple[int, int]]:
  """(number of chips, links out of each) along every side of the torus that a group spans."""
  sides = []
  for axis, length in enumerate(topology.shape):
    side = len({device.coords[axis] for device in group})
    if side > 1:
      sides.append((side, 2 if side == length >= (topology.chip.ring or math.inf) else 1))
  return sides
