"""Times of steps and collectives, against arithmetic by hand on hypothetical machines."""
import dataclasses
from typing import NamedTuple

import pytest

from moejax.parallel.chips import Chip
from moejax.planning import roofline
from moejax.planning.collectives import Collective
from moejax.planning.topologies import Topology

TPU = Chip('TPU', memory=10, peak=100., bandwidth=10., link=1., ring=4)
GPU = dataclasses.replace(TPU, link=8., network=1., ring=None)


class Device(NamedTuple):
  coords: tuple[int, ...] = ()
  process_index: int = 0


def torus(*sides):
  devices = [Device((x, y)) for y in range(sides[1]) for x in range(sides[0])]
  return Topology('', TPU, sides, tuple(devices))


HOSTS = Topology('', GPU, (2, 4), tuple(Device((), host) for host in range(2) for _ in range(4)))


def seconds(topology, kind, group, size=1200):
  return roofline.seconds(Collective(kind, size, group), topology, topology.devices)


def test_a_step_is_the_longer_of_compute_and_memory_and_then_communication():
  topology = torus(4, 2)
  found = roofline.estimate(topology, topology.devices, 500., 30., [
      Collective('collective-permute', 7, (0, 1), times=3)])
  assert (found.compute, found.memory, found.communication, found.step) == (5., 3., 21., 26.)
  assert roofline.estimate(topology, topology.devices, 100., 30., []).step == 3.


@pytest.mark.parametrize('kind, group, expected', [
    # A row of 4 is a ring: two links each way carry 3/4 of the array, an all-reduce sends that twice.
    ('all-gather', (0, 1, 2, 3), 900 / 2),
    ('all-reduce', (0, 1, 2, 3), 1800 / 2),
    # Half of the row is a line, and so is a column of 2.
    ('all-gather', (0, 1), 600),
    ('reduce-scatter', (0, 4), 600),
    # All 8: the links of both sides.
    ('all-gather', tuple(range(8)), 1050 / 3),
    # Across the middle of the ring go 2 devices' halves, over 2 links: 1200 * 4 / 4 / 2.
    ('all-to-all', (0, 1, 2, 3), 600),
    ('all-to-all', (0, 4), 600),
    ('all-to-all', tuple(range(8)), 600),
    ('collective-permute', (0, 1, 2, 3), 1200),
])
def test_a_torus_gives_the_links_of_the_sides_that_a_group_spans(kind, group, expected):
  assert seconds(torus(4, 2), kind, group) == expected


@pytest.mark.parametrize('kind, group, expected', [
    ('all-gather', (0, 1, 2, 3), 900 / 8),
    # Between hosts every GPU has its own port, and what all four bring in is passed on inside.
    ('all-gather', tuple(range(8)), 1050 / 4),
    ('all-gather', (0, 4), 600),
    # Half of what a device swaps goes to the other host.
    ('all-to-all', tuple(range(8)), 600),
    ('all-to-all', (0, 1, 2, 3), 900 / 8),
])
def test_between_hosts_the_network_is_the_limit(kind, group, expected):
  assert seconds(HOSTS, kind, group) == expected


def test_assumptions_name_the_numbers_of_the_chip():
  assert any('8 GB/s' not in line for line in roofline.assumptions(HOSTS))
  assert any('closed to a ring (from 4 chips)' in line for line in roofline.assumptions(torus(4, 2)))
