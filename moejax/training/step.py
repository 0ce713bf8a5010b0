"""One training step: the update of everything that training changes.

    augmented batch -> gradients of microbatches -> their mean -> optimizer -> router state -> average -> is all sound?

The step is one `jax.jit`ed function over plain trees, sharded by `parallel/rules.py`; its input state is donated.
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.functional import Tree, add_updates, flatten, merge_updates, unflatten
from moejax.parallel import rules
from moejax.random import derive
from moejax.training import optimizer_state
from moejax.training.durability import spikes

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes while training.

  Attributes:
    step: <int32>[] batches taken, including skipped ones.
    params: float32 parameters of the model.
    router_state: state that routers keep between steps.
    opt_state: state of the optimizer.
    skips: statistics of skipped batches, see `spikes.initial`.
    average: exponential moving average of `params`, or None.
  """
  step: jax.Array
  params: Tree
  router_state: Tree
  opt_state: Any
  skips: spikes.Skips
  average: Tree | None = None

  @property
  def evaluated(self) -> Tree:
    """The parameters that evaluation uses: the average, if there is one."""
    return self.params if self.average is None else self.average


def state_shardings(setup) -> TrainState:
  """The `NamedSharding` of every leaf of the train state."""
  params, router_state = setup.model.shapes()
  whole: Any = rules.replicated(setup.mesh)
  optimizer = rules.shardings(setup.mesh, setup.model.axes, params, setup.rules.optimizer)
  return TrainState(
      step=whole,
      params=rules.shardings(setup.mesh, setup.model.axes, params, setup.rules.parameters),
      router_state=rules.shardings(setup.mesh, setup.model.state_axes, router_state),
      opt_state=optimizer_state.state_shardings(setup.optimizer.transform, params, optimizer, whole),
      skips=jax.tree.map(lambda _: whole, jax.eval_shape(spikes.initial)),
      average=None if setup.training.average is None else optimizer)


class Given(NamedTuple):
  """The initial value of a parameter, or of router state, that is not drawn.

  Attributes:
    array: of the shape of the parameter; or its `entries` alone, while the others are drawn.
    entries: <int32>[N] along its first axis; None: all.
  """
  array: jax.Array
  entries: np.ndarray | None = None


def init_function(setup) -> Callable[..., TrainState]:
  """A function that returns the initial state; pure, for `jax.jit` and `jax.eval_shape`.

  Its argument has what is `Given`, by path; None: all is drawn.
  """
  def init(given: Mapping[str, Given] | None = None):
    drawn = setup.model.init(derive(jax.random.key(setup.seed), 'init'))
    params, router_state = drawn if given is None else (_replaced(tree, given) for tree in drawn)
    average = None if setup.training.average is None else jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), params, router_state, setup.optimizer.transform.init(params), spikes.initial(),
                       average)
    # Without weak types, which the step would not return: it would be compiled twice.
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)
  return init


def abstract_state(setup) -> TrainState:
  """The train state as `jax.ShapeDtypeStruct`s with their shardings."""
  return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                      jax.eval_shape(init_function(setup)), state_shardings(setup))


def abstract_batch(setup) -> dict[str, jax.ShapeDtypeStruct]:
  """The batch of a step as `jax.ShapeDtypeStruct`s with their shardings."""
  sharding = rules.batch_sharding(setup.mesh)
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
          for name, leaf in setup.pipeline.batch_spec().items()}


def init_state(setup, given: Mapping[str, Given] | None = None) -> TrainState:
  """The initial state, created with its shardings.

  Args:
    given: {path: what is not drawn}, with the shardings of `state_shardings`. It is not donated, since arrays on a CPU
      may share memory with those of the host; a step needs room for as many gradients anyway.
  """
  # On a CPU, optimising this program, which runs once, would take longer than all else at the start of a run.
  options = {'xla_backend_optimization_level': 1} if jax.default_backend() == 'cpu' else None
  return jax.jit(init_function(setup), out_shardings=state_shardings(setup), compiler_options=options)(given)


def _replaced(tree: Tree, given: Mapping[str, Given]) -> Tree:
  def replaced(leaf, value):
    return value.array if value.entries is None else leaf.at[value.entries].set(value.array)
  return unflatten({path: replaced(leaf, given[path]) if path in given else leaf
                    for path, leaf in flatten(tree).items()})


def make_train_step(setup) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
  """The compiled step: `(state, batch) -> (state, metrics)`; `state` is donated.

  `metrics` holds arrays on the device: `train/loss` (objective and router losses), `train/<metric of the objective>`,
  `train/router_loss`, `train/learning_rate`, `train/grad_norm`, `train/param_norm`, `train/skipped`,
  `recovery/in_a_row`, `recovery/not_finite`, `gradient_norm/<module>` and `router/<layer>/<metric>`. Where
  `spikes.judge` refuses the loss or the gradient, or the learning rate or the router state is not finite,
  `train/skipped` is True and only `step` and `skips` of the returned state are new. Where an applied update leaves
  non-finite arrays, counted by `recovery/not_finite`, the state is lost, and `rollback` restores a finite one.
  """
  def step(state, batch):
    return train_step(setup, state, batch)

  states, batches = state_shardings(setup), rules.batch_sharding(setup.mesh)
  return jax.jit(step, donate_argnums=0, in_shardings=(states, batches),
                 out_shardings=(states, rules.replicated(setup.mesh)))


def train_step(setup, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
  """The step itself, a pure function. Step n draws all its randomness from `derive(key(seed), n)`."""
  key = jax.random.fold_in(jax.random.key(setup.seed), state.step)
  with rules.use(setup.mesh, setup.rules):
    batch = setup.pipeline.augment(batch, derive(key, 'augment'))
    gradients, (router_state, metrics) = accumulate(setup, state, batch, key)

  loss, gradient_norm = metrics['train/loss'], optax.tree.norm(gradients)
  accepted, limits = spikes.judge(setup.recovery, state.skips, loss, gradient_norm)
  learning_rate = jnp.asarray(setup.optimizer.schedule(state.step), jnp.float32)
  spoiled_routers = not_finite(router_state)
  accepted &= jnp.isfinite(learning_rate) & (spoiled_routers == 0)
  updates, opt_state = setup.optimizer.transform.update(gradients, state.opt_state, state.params)
  params: Any = optax.apply_updates(state.params, updates)
  average = state.average
  if average is not None:
    average = moving_average(average, params, setup.training.average)
  new = TrainState(state.step, params, router_state, opt_state, state.skips, average)
  new = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, state)
  # A finite gradient can give an update that is not: a decay or an accumulator can overflow. Undoing it here would need
  # a second copy of parameters and optimizer state in every step.
  spoiled = not_finite(new)
  skips = spikes.record(state.skips, accepted & (spoiled == 0), loss, gradient_norm)
  new = dataclasses.replace(new, step=state.step + 1, skips=skips,
                            opt_state=optimizer_state.at_step(new.opt_state, state.step + 1))

  metrics |= limits
  metrics['train/skipped'] = ~accepted
  metrics['recovery/in_a_row'] = skips['in_a_row']
  metrics['recovery/not_finite'] = spoiled + spoiled_routers
  metrics['train/learning_rate'] = learning_rate
  metrics['train/grad_norm'] = gradient_norm
  metrics['train/param_norm'] = optax.tree.norm(state.params)
  for module, norm in norms_by_module(gradients).items():
    metrics[f'gradient_norm/{module}'] = norm
  return new, metrics


def moving_average(average: Tree, params: Tree, decay: float) -> Tree:
  """`decay * average + (1 - decay) * params`, leaf by leaf (Polyak averaging with exponential forgetting)."""
  return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def not_finite(tree: Any) -> jax.Array:
  """<int32>[] How many floating-point arrays of `tree` hold NaN or infinity."""
  return sum(((~jnp.isfinite(leaf).all()).astype(jnp.int32) for leaf in jax.tree.leaves(tree)
              if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.int32(0))


def norms_by_module(tree: Tree) -> dict[str, jax.Array]:
  """<float32>[] Euclidean norm of every module's own leaves, by the module's path, in the order of the tree."""
  squares: dict[str, jax.Array] = {}
  for path, leaf in flatten(tree).items():
    module = path.rpartition('/')[0] or path
    squares[module] = squares.get(module, 0.) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return {module: jnp.sqrt(square) for module, square in squares.items()}


def accumulate(setup, state: TrainState, batch: dict, key: jax.Array) -> tuple[Tree, tuple[Tree, Metrics]]:
  """(gradients, (router state, metrics)) of `batch`, computed in `training.accumulate` microbatches.

  The objective is the mean over all examples or tokens of the batch, however unevenly they fall into microbatches.
  Router losses and router metrics are means over microbatches weighted by their valid tokens, in each layer: exact
  where they are means over tokens (z-loss, entropy, confidence) or sums of them; an estimate where they are functions
  of such means (balance losses), since each microbatch is routed on its own. Router state is updated once, with the
  statistics of all.
  """
  count = setup.training.accumulate

  def gradient(*args):
    gradients, others = jax.grad(loss_function, argnums=1, has_aux=True)(*args)
    placed = rules.shardings(setup.mesh, setup.model.axes, gradients, setup.rules.gradients)
    return jax.lax.with_sharding_constraint(gradients, placed), others

  if count == 1:
    gradients, (updates, metrics) = gradient(setup, state.params, state.router_state, batch, key, jnp.float32(1))
    return gradients, (merge_updates(state.router_state, updates), metrics)
  total = jnp.maximum(setup.objective.weight(batch), 1)

  def split(x):
    # Every count-th example, so that each device keeps its own.
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

  def of_one(index, micro, shares):
    weight = setup.objective.weight(micro) * count / total
    micro_key = jax.random.fold_in(derive(key, 'microbatch'), index)
    return gradient(setup, state.params, state.router_state, micro, micro_key, weight, shares)

  parts = jax.tree.map(split, batch)
  microbatches = (jnp.arange(count), parts, token_shares(setup, state, parts, key))

  def add(sums, micro):
    (gradients, (updates, metrics)), (more, (moved, logged)) = sums, of_one(*micro)
    plus = lambda one, other: jax.tree.map(jnp.add, one, other)
    return (plus(gradients, more), (add_updates(updates, moved), plus(metrics, logged))), None

  shapes = jax.eval_shape(of_one, *jax.tree.map(lambda x: x[0], microbatches))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (gradients, (updates, metrics)), _ = jax.lax.scan(add, zeros, microbatches)
  mean = lambda sums: jax.tree.map(lambda x: (x / count).astype(x.dtype), sums)
  return mean(gradients), (merge_updates(state.router_state, updates), mean(metrics))


def token_shares(setup, state: TrainState, microbatches: dict, key: jax.Array) -> dict[str, jax.Array]:
  """`{layer: <float32>[M]}`: valid tokens of each of the M microbatches over their mean, counted by that layer's router.

  Only models know which tokens of a batch they route. Only the counts are used here, so the compiler removes the rest
  of the pass.
  """
  def tokens(micro):
    output = setup.model.apply(state.params, state.router_state, micro, key=key, train=True)
    return {layer: router.tokens for layer, router in output.routers.items()}
  counts = jax.lax.map(tokens, microbatches)
  return {layer: n * len(n) / jnp.maximum(n.sum(), 1) for layer, n in counts.items()}


def loss_function(setup, params: Tree, router_state: Tree, batch: dict, key: jax.Array, weight: jax.Array,
                  shares: dict[str, jax.Array] | None = None):
  """(loss, (updates of router state, metrics)) of one microbatch.

  `weight` multiplies its objective, `shares` the losses and metrics of each layer's router.
  """
  def forward(key, batch):
    return setup.model.apply(params, router_state, batch, key=key, train=True)

  objective, metrics, output = setup.method(forward, setup.objective, batch, key)
  if shares is not None:
    output = dataclasses.replace(output, routers={
        layer: _counted(router, shares[layer], setup.training.accumulate) for layer, router in output.routers.items()})
  router_loss = setup.objective.router_loss(output)
  loss = weight * objective + router_loss
  logged = {f'train/{name}': weight * value for name, value in metrics.items()}
  logged |= {'train/loss': loss, 'train/router_loss': router_loss}
  for layer, router in output.routers.items():
    logged |= {f'router/{layer}/{name}': jnp.asarray(value, jnp.float32) for name, value in router.metrics.items()}
  return loss, (output.updates, logged)


def _counted(router, share, parts):
  # The router's losses and metrics of a microbatch, scaled so that their mean over microbatches is that of the batch.
  def counted(values, suffix=''):
    totals = {name + suffix for name in router.totals}
    return {name: (parts if name in totals else share) * value for name, value in values.items()}
  return dataclasses.replace(router, losses=counted(router.losses), metrics=counted(router.metrics, '_loss'))
