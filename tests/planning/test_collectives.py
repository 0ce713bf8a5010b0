"""Collectives counted in compiled programs, against small programs whose collectives are known by hand.

Each program runs one collective on x <float32>[8 * 64, 1024], of which a device has 64 rows: 256 KiB. The same programs
are compiled for TPU and for H100, which write them down otherwise, where their compilers are installed.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.planning import topologies
from moejax.planning.collectives import Collective, collectives, count

ROWS, KIB = 64, 2**10
SHARD = 256 * KIB


def loop(times, body):
  return lambda x: jax.lax.scan(lambda x, _: (body(jnp.sin(x)), None), x, length=times)[0]


swap = lambda x: jax.lax.all_to_all(x, 'x', 0, 0, tiled=True)
PROGRAMS = {
    'psum': (lambda x: jax.lax.psum(x, 'x'), {'all-reduce': (1, SHARD)}),
    'all_gather': (lambda x: jax.lax.all_gather(x, 'x', tiled=True), {'all-gather': (1, 8 * SHARD)}),
    'psum_scatter': (lambda x: jax.lax.psum_scatter(x, 'x', tiled=True), {'reduce-scatter': (1, SHARD)}),
    'all_to_all': (swap, {'all-to-all': (1, SHARD)}),
    'ppermute': (lambda x: jax.lax.ppermute(x, 'x', [(i, (i + 1) % 8) for i in range(8)]),
                 {'collective-permute': (1, SHARD)}),
    'in a loop of 3': (loop(3, swap), {'all-to-all': (3, 3 * SHARD)}),
    'in a loop of 3 in a loop of 5': (loop(5, lambda x: loop(3, swap)(x) + 1), {'all-to-all': (15, 15 * SHARD)}),
    'in one branch': (lambda x: jax.lax.cond(x[0, 0] > 0, swap, lambda x: x, x), {'all-to-all': (1, SHARD)}),
    'none': (jnp.sin, {}),
}


def text(program, devices):
  """The program, compiled for devices, by which the rows of x are shared."""
  mesh = Mesh(np.asarray(devices), ('x',), axis_types=(AxisType.Auto,))
  spec = PartitionSpec('x')
  x = jax.ShapeDtypeStruct((len(devices) * ROWS, 1024), jnp.float32, sharding=NamedSharding(mesh, spec))
  function = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.jit(function).lower(x).compile().as_text()


@pytest.mark.parametrize('name', PROGRAMS)
def test_each_collective_is_found_with_its_bytes_and_its_runs(name):
  program, expected = PROGRAMS[name]
  found = collectives(text(program, jax.devices()))
  assert count(found) == expected
  assert all(c.group == tuple(range(8)) and c.exact for c in found)


@pytest.mark.parametrize('topology', ['v5e:2x4', 'v6e:2x4', 'h100:1x8'])
@pytest.mark.parametrize('name', PROGRAMS)
def test_each_collective_is_found_in_a_compile_for(name, topology):
  if lack := topologies.missing(topology):
    pytest.skip(f'needs {lack}')
  program, expected = PROGRAMS[name]
  found = collectives(text(program, topologies.load(topology).devices))
  assert count(found) == expected
  assert all(c.group_size == 8 and c.exact for c in found)


@pytest.mark.parametrize('topology', ['v5e:4x4', 'v5p:2x2x4', 'h100:2x8'])
def test_sharded_matmuls_in_a_compile_for_gather_every_weight_once_a_step(topology):
  """w[5,2048,8192] lies in shards; 5 layers gather them, however the compiler splits, fuses and delays it.

  A device needs every layer's weight, of which it has 1/n: what it sends or gets is 5 * (1 - 1/n) * 32 MiB in bfloat16.
  """
  if lack := topologies.missing(topology):
    pytest.skip(f'needs {lack}')
  devices = topologies.load(topology).devices
  mesh = Mesh(np.asarray(devices), ('x',), axis_types=(AxisType.Auto,))
  array = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16,
                                                    sharding=NamedSharding(mesh, PartitionSpec(*spec)))

  def layers(w, x):
    whole = NamedSharding(mesh, PartitionSpec())
    layer = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole))[:, :2048], None)
    return jax.lax.scan(layer, x, w)[0]

  compiled = jax.jit(layers).lower(array((5, 2048, 8192), None, 'x'), array((1024 * len(devices), 2048), 'x')).compile()
  moved = sum(c.times * c.sent for c in collectives(compiled.as_text()))
  assert moved == pytest.approx(5 * (1 - 1 / len(devices)) * 32 * 2**20, rel=0.1)


def test_groups_are_the_devices_along_the_mesh_axis():
  mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)
  x = jax.ShapeDtypeStruct((8 * ROWS, 1024), jnp.float32,
                           sharding=NamedSharding(mesh, PartitionSpec(('data', 'expert'))))

  def of(axis):
    function = jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=x.sharding.spec,
                             out_specs=x.sharding.spec, check_vma=False)
    return collectives(jax.jit(function).lower(x).compile().as_text())

  assert [c.group for c in of('expert')] == [(0, 1, 2, 3)]
  assert [c.group for c in of('data')] == [(0, 4)]


PROGRAM = '''HloModule m, replica_count=1, num_partitions=16

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %r = f32[4]{0} all-reduce(%x), replica_groups=[4,4]<=[4,4]T(1,0), to_apply=%sum, metadata={op_name="a/{b}"}
  ROOT %t = (s32[], /*index=1*/f32[4]{0}) tuple(%next, %r)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(LAST)
  ROOT %test = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(1)
  %start = (s32[], f32[4]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
  ROOT %y = f32[4]{0} get-tuple-element(%loop), index=1
}
'''


@pytest.mark.parametrize('last, trips', [(1, 0), (2, 1), (3, 1), (4, 2), (9, 4)])
def test_runs_of_a_loop_are_counted_from_its_condition_where_nothing_says_them(last, trips):
  """It counts 1, 3, 5, ... while that is less than LAST."""
  found, = collectives(PROGRAM.replace('LAST', str(last)))
  assert (found.times, found.where, found.bytes, found.exact) == (trips, 'a/{b}', 16, True)


def test_a_loop_whose_end_is_not_in_the_program_counts_once_and_says_so():
  unknown = PROGRAM.replace('s32[] constant(LAST)', 's32[] get-tuple-element(%q), index=0')
  unknown = unknown.replace('%end =', '%q = (s32[]) custom-call(%p), custom_call_target="clock"\n  %end =')
  found, = collectives(unknown)
  assert (found.times, found.exact) == (1, False)


@pytest.mark.parametrize('written, group', [
    ('replica_groups={{0,8},{1,9}}', (0, 8)),
    ('replica_groups=[4,4]<=[16]', (0, 1, 2, 3)),
    ('replica_groups=[4,4]<=[4,4]T(1,0)', (0, 4, 8, 12)),
    ("replica_groups=mesh['a'=2,'b'=8] {'b'}", tuple(range(8))),
    ("replica_groups=mesh['a'=2,'b'=8] {'a'}", (0, 8)),
    ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=8] {'b':(1)2}", (0, 4)),
    ('replica_groups={}', tuple(range(16))),
])
def test_every_way_of_writing_groups_is_read(written, group):
  found, = collectives(PROGRAM.replace('LAST', '3').replace('replica_groups=[4,4]<=[4,4]T(1,0)', written))
  assert found.group == group


def test_a_device_sends_what_rings_send():
  of = functools.partial(Collective, bytes=1200, group=(0, 1, 2, 3))
  assert {kind: of(kind).sent for kind in ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute')} == {
      'all-reduce': 1800, 'all-gather': 900, 'all-to-all': 900, 'collective-permute': 1200}
