"""Expert parallelism: tokens are sent to the devices that hold their experts, and the outputs are sent back.

A dispatcher runs on every device over its own tokens (mesh axes data, fsdp, expert), inside one `jax.shard_map`, so
every collective is written explicitly here:

    method              forward, over the mesh axis `expert`                     traffic per device and direction
    all_to_all          buffers of fixed capacity, and their outputs back        E*C*D per group of its tokens
    all_gather          all tokens and routes, sums back (reduce-scatter)        N*D, N the tokens of the whole axis
    ragged_all_to_all   the routed rows, and their outputs back                  K*D per token, without padding

and the transposed collectives backward. The first requires a capacity; the others are dropless, so a device needs
memory for all rows of the axis. Weights sharded over `fsdp` are gathered; hidden units sharded over `model` give
partial sums, which are added on output. If there are fewer experts than devices on the axis, each expert's hidden units
are sharded over it, and all tokens visit every device.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from moejax import experts as experts_lib
from moejax import functional
from moejax.config import ConfigError
from moejax.dispatch import ragged
from moejax.experts.layouts import Buffers, HiddenShard, row_ids
from moejax.kernels.target import target
from moejax.parallel import rules
from moejax.routing.plans import Plan, SlotPlan, TokenPlan

Dropless = Literal['all_gather', 'ragged_all_to_all']
Method = Literal['all_to_all'] | Dropless
Run = Callable[[Plan, jax.Array, experts_lib.BoundExperts], jax.Array]


def over_devices(run: Run, plan: Plan, x: Float[Array, 'G S D'], experts: experts_lib.BoundModule, *,
                 method: Method | None, chunks: int) -> Float[Array, 'G S D']:
  """Computes `run(plan, x, experts)` on all devices of the active mesh, which has several.

  Args:
    run: the dispatcher's `run`.
    plan: for the G groups of S tokens of `x`; with a capacity for 'all_to_all'.
    x: <float>[G,S,D].
    experts: all experts.
    method: of the exchange; None: the dropless method with less traffic.
    chunks: number of parts sent and computed in turn, so that one is sent while another is computed.

  Returns:
    <float>[G,S,D].

  Raises:
    ConfigError: the number of experts or chunks does not divide evenly.
  """
  mesh = rules.active()
  assert mesh is not None
  plan = dataclasses.replace(plan, passthrough=None)
  shards = rules.batch_shards(mesh)
  shape = x.shape
  if isinstance(plan, TokenPlan) and method != 'all_to_all':
    # Without slots groups have no meaning: the tokens of a device form one group.
    plan, x = jax.tree.map(lambda a: a.reshape(shards, -1, *a.shape[2:]), (dataclasses.replace(plan, slot=None), x))
  if len(x) % shards:
    return run(plan, x, experts)  # Groups span devices: the compiler chooses the communication.

  variables, axes, rebuild = functional.open_module(experts.experts)
  specs = {path: rules.parameter_spec(axes[path], variables[path].shape) for path in variables}
  hidden = _hidden_axes(axes, specs)
  _check(mesh, plan.num_experts, hidden)
  if 'expert' in hidden:
    method = 'all_gather'
  if method is None:
    method = dropless_method(plan, mesh.shape['expert'])

  def local(plan, x, variables, key):
    with rules.use(None):
      module = rebuild({path: _over_fsdp(variables[path], specs[path], experts.experts) for path in variables})
      bound = dataclasses.replace(experts, experts=module, key=key)
      here = DeviceExperts(bound, plan.num_experts, x.shape[0] * x.shape[1], 'expert' in hidden,
                           HiddenShard(hidden) if hidden else None)
      return _METHODS[method](run, plan, x, here, chunks).astype(x.dtype)[None]

  batch = PartitionSpec(rules.BATCH_AXES)
  parts = 'model' if 'model' in hidden else None
  y = jax.shard_map(local, mesh=mesh, in_specs=(batch, batch, specs, PartitionSpec()), check_vma=False,
                    out_specs=PartitionSpec(parts, rules.BATCH_AXES))(plan, x, variables, experts.key)
  # Outside the shard_map, where the sum over shards is one all-reduce forward and none backward.
  return y.sum(0).reshape(shape)


def dropless_method(plan: Plan, devices: int) -> Dropless:
  """The dropless exchange with less traffic that the current target supports."""
  choices = plan.expert.shape[-1] if isinstance(plan, TokenPlan) else devices
  return 'ragged_all_to_all' if choices < devices and target().platform != 'cpu' else 'all_gather'


@dataclasses.dataclass(frozen=True)
class DeviceExperts:
  """The experts on one device of a `shard_map`.

  Attributes:
    call: the experts with this device's shards of the weights.
    num_experts: E.
    tokens: number of tokens per device.
    inside: whether every expert's hidden units are sharded over the `expert` axis.
    part: this device's shard of the hidden units; None: all of them.
  """
  call: experts_lib.BoundModule
  num_experts: int
  tokens: int
  inside: bool
  part: HiddenShard | None

  @property
  def count(self) -> int:
    """Number of experts on this device."""
    return self.num_experts if self.inside else self.num_experts // jax.lax.axis_size('expert')

  @property
  def first(self) -> Int[Array, ''] | int:
    """Index of its first expert."""
    return 0 if self.inside else jax.lax.axis_index('expert') * self.count

  def experts(self, number: Callable[[jax.Array], jax.Array]) -> 'LocalExperts':
    """A call of this device's experts; `number` maps a local row id to its global id."""
    return LocalExperts(self.call.experts, self.call.key, self.call.train, number, self.part)

  def number(self, token: Int[Array, 'N'], first: Int[Array, ''] | int = 0, count: int | None = None):
    """`LocalExperts.number` for rows of `token` <int32>[N], indices among all devices' tokens, and `count` experts."""
    count = self.num_experts if count is None else count
    return lambda ids: row_ids(token.at[ids // count].get(mode='clip'), first + ids % count, self.num_experts)

  def own_tokens(self) -> Int[Array, 'T']:
    """<int32>[T] indices of this device's tokens among all devices' tokens."""
    return jax.lax.axis_index(rules.BATCH_AXES) * self.tokens + jnp.arange(self.tokens)


@dataclasses.dataclass(frozen=True)
class LocalExperts(experts_lib.BoundModule):
  """This device's experts, as a dispatcher calls them.

  Attributes:
    number: maps a local row id to its global id, so that dropout is the same on every mesh.
    part: shard of the hidden units.
  """
  number: Callable[[jax.Array], jax.Array] = lambda ids: ids
  part: HiddenShard | None = None

  def __call__(self, rows: Float[Array, '... D'], layout: Any) -> Float[Array, '... D']:
    """See `BoundExperts`."""
    layout = dataclasses.replace(layout, row_ids=self.number(layout.row_ids), part=self.part)
    return super().__call__(rows, layout)

  def block(self):
    """See `BoundExperts`."""
    block = super().block()
    if block is None or self.part is None or block.weights.bo is None:
      return block
    return block._replace(weights=block.weights._replace(bo=self.part.once(block.weights.bo)))


# ---- the three ways -------------------------------------------------------------------------------------------------


def _by_all_to_all(run, plan, x, here, chunks):
  return run(plan, x, _BufferedExperts(here, chunks))


@dataclasses.dataclass(frozen=True)
class _BufferedExperts(experts_lib.BoundExperts):
  """The experts of all devices, as a dispatcher with buffers calls them."""
  here: DeviceExperts
  chunks: int

  def __call__(self, rows: jax.Array, layout: Buffers) -> jax.Array:
    there = functools.partial(jax.lax.all_to_all, axis_name='expert', split_axis=0, concat_axis=1, tiled=True)
    back = functools.partial(jax.lax.all_to_all, axis_name='expert', split_axis=1, concat_axis=0, tiled=True)
    ids = self.here.number(self.here.own_tokens())(layout.row_ids)
    experts = self.here.experts(lambda ids: ids)
    if rows.shape[1] % self.chunks:
      raise ConfigError(f'.chunks = {self.chunks} does not divide the {rows.shape[1]} slots that a device '
                        'sends to each expert: choose a divisor or another capacity.')
    y = [back(experts(there(part), Buffers(there(part_ids))))
         for part, part_ids in zip(jnp.split(rows, self.chunks, 1), jnp.split(ids, self.chunks, 1))]
    return jnp.concatenate(y, axis=1)


def _by_all_gather(run, plan, x, here, chunks):
  def gather(a):
    return jax.lax.all_gather(a, 'expert', tiled=True)

  def compute(plan, x, token):
    if isinstance(plan, TokenPlan):
      # Dropped choices are marked by expert E instead of `kept`: one array fewer to send.
      plan = dataclasses.replace(plan, expert=jnp.where(plan.kept, plan.expert, plan.num_experts), kept=None)
    plan = _restricted(jax.tree.map(gather, plan), here.first, here.count)
    y = run(plan, gather(x), here.experts(here.number(gather(token), here.first, here.count)))
    return jax.lax.psum_scatter(y.astype(x.dtype), 'expert', tiled=True)
  return _in_chunks(compute, plan, x, here, chunks)


def _restricted(plan, first, count):
  # The plan restricted to `count` experts.
  if isinstance(plan, SlotPlan):
    own = lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=1)
    return dataclasses.replace(plan, token=own(plan.token), weight=own(plan.weight), filled=own(plan.filled))
  expert = plan.expert - first
  kept = (expert >= 0) & (expert < count)
  return dataclasses.replace(plan, expert=jnp.where(kept, expert, 0), kept=kept, num_experts=count)


def _by_ragged_all_to_all(run, plan, x, here, chunks):
  def compute(plan, x, token):
    return run(plan, x, ragged.RaggedExperts(here.experts(lambda ids: ids), here.number(token)))
  return _in_chunks(compute, plan, x, here, chunks)


def _in_chunks(compute, plan, x, here, chunks):
  if not isinstance(plan, TokenPlan) or chunks == 1:
    return compute(plan, x, here.own_tokens())
  if x.shape[1] % chunks:
    raise ConfigError(f'.chunks = {chunks} does not divide the {x.shape[1]} tokens of a device: choose a '
                      'divisor.')
  split = lambda a: jnp.split(a, chunks, axis=1)
  plans = zip(*map(split, jax.tree.leaves(plan)))
  y = [compute(jax.tree.unflatten(jax.tree.structure(plan), part), rows, token[0])
       for part, rows, token in zip(plans, split(x), split(here.own_tokens()[None]))]
  return jnp.concatenate(y, axis=1)


_METHODS = {'all_to_all': _by_all_to_all, 'all_gather': _by_all_gather, 'ragged_all_to_all': _by_ragged_all_to_all}


# ---- weights --------------------------------------------------------------------------------------------------------


def _hidden_axes(axes, specs) -> tuple[str, ...]:
  # The mesh axes over which hidden units are sharded.
  for path, spec in specs.items():
    for name, entry in zip(axes[path], spec):
      if name == 'expert_mlp' and entry is not None:
        return entry if isinstance(entry, tuple) else (entry,)
  return ()


def _over_fsdp(variable, spec, experts):
  # Gathered in the dtype of the computation, half the bytes of the stored float32.
  for dimension, entry in enumerate(spec):
    if entry == 'fsdp':
      return jax.lax.all_gather(variable.astype(experts.dtype), 'fsdp', axis=dimension, tiled=True)
  return variable


def _check(mesh: Mesh, num_experts: int, hidden: tuple[str, ...]) -> None:
  devices = mesh.shape['expert']
  if num_experts % devices and 'expert' not in hidden:
    shares = math.prod(mesh.shape[axis] for axis in ('expert', 'model'))
    raise ConfigError(f': with {num_experts} experts on the {devices} devices of the mesh axis `expert`, hidden '
                      f'units are split {shares} ways (expert x model), which does not divide them. Make '
                      f'config.model.moe.experts.hidden a multiple of {shares}, or config.mesh.expert a divisor of '
                      f'{num_experts}.')
