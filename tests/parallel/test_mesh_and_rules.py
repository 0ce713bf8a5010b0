"""The mesh and the table of sharding rules, against shardings written out by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.config import ConfigError
from moejax.parallel import mesh, rules


def test_a_free_axis_takes_the_devices_that_the_others_leave():
  assert dict(mesh.build(dict(data=-1, expert=4)).shape) == dict(data=2, fsdp=1, expert=4, model=1)
  assert dict(mesh.build({}).shape) == dict(data=8, fsdp=1, expert=1, model=1)
  assert mesh.build({}, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize('config, sentence', [
    (dict(data=3), 'data=3 x fsdp=1 x expert=1 x model=1 do not make 8 devices: config.mesh.data = 8 would'),
    (dict(data=-1, expert=3), 'do not make 8 devices: config.mesh.expert = 2 or 4 would'),
    (dict(data=-1, expert=16), 'do not make 8 devices: config.mesh.expert = 8 would'),
    (dict(data=-1, expert=2, model=8), 'do not make 8 devices: config.mesh.expert = 1 would'),
    (dict(data=-1, expert=3, model=3), 'do not make 8 devices: the product must be 8, or divide it where'),
    (dict(data=-1, fsdp=-1), 'only one axis may be -1, not data and fsdp'),
    (dict(expert=0), 'config.mesh.expert must be one of -1 or an int of at least 1'),
    (dict(experts=2), "Did you mean 'expert'?"),
])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, sentence):
  with pytest.raises(ConfigError, match=sentence.replace('?', r'\?')):
    mesh.build(config)


def test_parameters_are_sharded_by_name_and_left_whole_where_the_mesh_does_not_divide_them():
  built = mesh.build(dict(data=1, fsdp=2, expert=2, model=2))
  axes = dict(moe=dict(wi=('expert', 'embed', 'mlp'), bias=('expert', 'mlp')), odd=('expert', 'embed'),
              scanned=('layers', 'embed', 'mlp'))
  shapes = dict(moe=dict(wi=jnp.zeros((4, 6, 8)), bias=jnp.zeros((4, 8))), odd=jnp.zeros((3, 6)),
                scanned=jnp.zeros((5, 6, 8)))
  found = jax.tree.map(lambda s: s.spec, rules.shardings(built, axes, shapes))
  assert found == dict(
      moe=dict(wi=PartitionSpec('expert', 'fsdp', 'model'), bias=PartitionSpec('expert', 'model')),
      odd=PartitionSpec(None, 'fsdp'), scanned=PartitionSpec(None, 'fsdp', 'model'))


def test_a_mesh_axis_is_used_once_an_array():
  built = mesh.build(dict(data=2, expert=4))
  with rules.use(built):
    out = jax.jit(lambda x: rules.constrain(x, ('expert', 'slot', 'embed')))(jnp.zeros((4, 8, 3)))
  assert out.sharding.spec[0] == 'expert'
  assert {s.data.shape for s in out.addressable_shards} == {(1, 4, 3)}


def test_constraints_change_no_value_and_do_nothing_without_a_mesh():
  x = jnp.arange(16.).reshape(8, 2)
  assert rules.active() is None
  assert rules.constrain(x, ('batch', 'embed')) is x
  with rules.use(mesh.build({})):
    np.testing.assert_array_equal(jax.jit(lambda x: rules.constrain(x, ('batch', 'embed')))(x), x)
  assert rules.active() is None


def test_the_batch_is_spread_over_every_axis_that_shares_it():
  built = mesh.build(dict(data=2, fsdp=2, expert=2))
  assert rules.batch_shards(built) == 8
  placed = jax.device_put(jnp.zeros((16, 3)), rules.batch_sharding(built))
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
