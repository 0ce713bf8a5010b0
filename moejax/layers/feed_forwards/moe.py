"""The mixture-of-experts layer: group, route, dispatch to experts, combine; optionally with a shared expert."""
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moejax import dispatch as dispatch_lib
from moejax import experts as experts_lib
from moejax.config import ConfigError, config_path
from moejax.experts.layouts import Dense
from moejax.layers import initializers
from moejax.layers.embeddings import Linear
from moejax.layers.sublayer import SUBLAYERS, Cache, Context, Left, Sublayer
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import LARGEST, Between, Count
from moejax.routing import router as router_lib
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import Leak
from moejax.routing.router import RouterOutput
from moejax.routing.valid_tokens import without_padding

# The largest number trained so far (2407.04153); 32-bit indices still allow a hundred slots each.
ExpertCount = Annotated[int, Between(1, 2**20)]


@SUBLAYERS('moe')
class MoE(Sublayer):
  """A mixture of experts.

  Config keys:
    num_experts: E.
    experts: the expert (`moejax.experts`).
    router: the stages of the router (`moejax.routing`).
    dispatch: the dispatcher (`moejax.dispatch`).
    group: tokens routed together, which compete for the slots of a capacity: the whole 'batch' (a microbatch:
      config.data.batch_size over config.training.accumulate, in evaluation too), one 'sequence' with all documents
      packed in it, or this many (the largest divisor of B*S that is at most this). For slots per document:
      router.place=dict(name='document_capacity').
    shared: an expert for all tokens besides the routed ones, e.g. `dict(name='feed_forward', hidden=64)`.
    shared_gate: how the two are added: 'sum' (as drawn in DeepSpeed-MoE, 2201.05596, section 4.1.1), or 'softmax': with
      two weights per token, the softmax of a linear map of the token (DeepSpeed's code: `use_residual`).
  """

  def __init__(self, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, num_experts: ExpertCount,
               experts: Mapping, router: Mapping, dispatch: Mapping,
               group: Literal['batch', 'sequence'] | Count = 'batch', shared: Mapping | None = None,
               shared_gate: Literal['sum', 'softmax'] = 'sum'):
    """Raises ConfigError for a number of experts that the active mesh does not divide."""
    check_experts(num_experts, rules.active())
    self.group, self.where = group, config_path()
    self.router = router_lib.build(router, '.router', dim=dim, num_experts=num_experts, rngs=rngs)
    self.dispatch = dispatch_lib.build(dispatch, '.dispatch')
    self.experts = experts_lib.build(experts, '.experts', dim=dim, num_experts=num_experts, dtype=dtype,
                                     rngs=rngs)
    self.shared = None if shared is None else experts_lib.build(
        shared, '.shared', dim=dim, num_experts=None, dtype=dtype, rngs=rngs)
    if shared_gate == 'softmax' and self.shared is None:
      raise ConfigError(f'.shared_gate = "softmax" requires a shared expert: set {config_path()}.shared.')
    self.shared_gate = None if shared_gate == 'sum' else Linear(
        shape=(dim, 2), axes=('embed', None), init=initializers.fan_in(in_axis=0, out_axis=1),
        bias_init=nnx.initializers.zeros, dtype=jnp.float32, rngs=rngs)

  def leak(self, train: bool) -> Leak:
    """Whether the router sees later tokens, or lets them compete for slots."""
    return self.router.leak(train)

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: Cache | None = None, *,
               key: jax.Array | None = None, train: bool = False) -> tuple[Float[Array, 'B S D'], Left]:
    """See `mix`."""
    y, routed = self.mix(x, context.inputs, key=key, train=train)
    return y, Left(routed)

  def mix(self, x: Float[Array, 'B S D'], inputs: RouterInputs | None = None, *, key: jax.Array | None = None,
          train: bool = False) -> tuple[Float[Array, 'B S D'], RouterOutput]:
    """Applies the layer.

    Args:
      x: <float>[B,S,D].
      inputs: the router's inputs besides `x`; fields [B,S].
      key: for noise in the router and dropout in the experts.
      train: whether to apply noise and dropout.

    Returns:
      <float>[B,S,D] of the dtype of `x`, and the router's output. Its plan is for groups, a row-major reshape of
      [B,S]: `output.plan.to_dense().weight.reshape(B, S, E)` has the weights per token.

    Raises:
      ConfigError: while tracing: the dispatcher cannot run the plan, or the tokens cannot be grouped as configured.
    """
    batch, length, dim = x.shape
    inputs = inputs or RouterInputs()
    x = without_padding(x, inputs.valid)
    tokens = tokens_per_group(self.group, batch, length, f'{self.where}.group')
    to_groups = lambda tree: jax.tree.map(lambda a: a.reshape(-1, tokens, *a.shape[2:]), tree)
    grouped = to_groups(x)
    routed = self.router(grouped, to_groups(inputs), key=derive(key, 'router'), train=train)
    with jax.named_scope('dispatch'):  # identifies its work in traced and compiled programs
      y = self.dispatch(routed.plan, grouped, self.experts, key=derive(key, 'experts'), train=train)
    y = y.reshape(batch, length, dim)
    if self.shared is not None:
      shared = self.shared(x, Dense(), key=derive(key, 'shared'), train=train).astype(y.dtype)
      if self.shared_gate is not None:
        share = jax.nn.softmax(self.shared_gate(x), axis=-1).astype(y.dtype)
        y, shared = share[..., :1] * y, share[..., 1:] * shared
      y = y + shared
    return y, routed


def tokens_per_group(group: str | int, batch: int, length: int, where: str) -> int:
  """S: the largest divisor of the B*S tokens that is at most `group`.

  Raises:
    ConfigError: it is less than half of `group`, so routing would differ from the config; or there are too many tokens
      for 32-bit indices.
  """
  total = batch * length
  if total > LARGEST:
    raise ConfigError(f'{where}: a batch of {batch} x {length} tokens exceeds the maximum of {LARGEST} routed at once. '
                      'Lower config.data.batch_size.')
  if isinstance(group, str):
    return total if group == 'batch' else length
  wanted = min(group, total)
  tokens = next((n for n in range(wanted, 0, -1) if total % n == 0), 0)
  if 2 * tokens < wanted or not tokens:
    raise ConfigError(f'{where}: {batch} x {length} tokens do not divide into groups of {group}; the next smaller size '
                      f'that divides them is {tokens}. Choose a divisor of {total}, "sequence" or "batch".')
  return tokens


def check_experts(num_experts: int, mesh: Mesh | None) -> None:
  """Raises ConfigError unless the mesh axis `expert` divides the number of experts, if they are at least as many."""
  devices = 1 if mesh is None else mesh.shape['expert']
  if mesh is not None and num_experts > devices and num_experts % devices:
    nearest = max(n for n in range(1, devices + 1) if num_experts % n == 0 and mesh.size % n == 0)
    raise ConfigError(f'.num_experts = {num_experts} is not a multiple of the {devices} devices of the mesh '
                      f'axis `expert`: make it a multiple of {devices}, or set config.mesh.expert = {nearest}.')
