"""The state of an optimizer is sharded like the parameters that it mirrors."""
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec
from training_fakes import MODEL

from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.training import optimizer, optimizer_state


@pytest.mark.parametrize('keys', [
    dict(name='adamw', weight_decay=0.3), dict(name='lion', weight_decay=0.3), dict(name='sgd', momentum=0.9),
    dict(name='adafactor', min_dim_size_to_factor=4)], ids=lambda keys: keys['name'])
def test_optimizer_state_is_sharded_as_the_parameters_it_mirrors(keys):
  config = dict(keys, schedule=dict(name='constant', peak=0.1), clip=1.)
  transform = optimizer.build(config, 'config.optimizer', model=MODEL, steps=100).transform
  mesh = mesh_lib.build(dict(data=2, expert=2, model=2))
  params, _ = MODEL.shapes()
  sharded = rules.shardings(mesh, MODEL.axes, params)
  found = optimizer_state.state_shardings(transform, params, sharded, rules.replicated(mesh))
  shapes = jax.eval_shape(transform.init, params)
  assert jax.tree.structure(found) == jax.tree.structure(shapes)
  # every leaf can be sharded so, and those of the experts' shape are spread over experts
  for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(found)):
    sharding.shard_shape(leaf.shape)
    if leaf.shape == (4, 3, 8):
      assert sharding == sharded['wi'] and sharding.spec[0] == 'expert'


def test_factors_of_adafactor_are_sharded_like_their_dimensions():
  params = dict(wi=jax.ShapeDtypeStruct((4, 256, 512), jnp.float32))
  mesh = mesh_lib.build(dict(data=1, expert=2, fsdp=2, model=2))
  sharded = rules.shardings(mesh, dict(wi=('expert', 'expert_embed', 'expert_mlp')), params)
  transform = optax.scale_by_factored_rms()
  found = optimizer_state.state_shardings(transform, params, sharded, rules.replicated(mesh))
  shapes = jax.eval_shape(transform.init, params)
  specs = {shapes.v_row['wi'].shape: found.v_row['wi'].spec, shapes.v_col['wi'].shape: found.v_col['wi'].spec}
  assert specs == {(4, 256): PartitionSpec('expert', 'fsdp'), (4, 512): PartitionSpec('expert', 'model')}
