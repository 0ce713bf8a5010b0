"""The expert of lucidrains/st-moe-pytorch: a gated feed-forward whose hidden units have learned scales."""
import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.experts import EXPERTS, Layout
from moejax.experts.feed_forward import FeedForwardExperts
from moejax.ranges import Count


@EXPERTS('scaled_geglu')
class ScaledGEGLU(FeedForwardExperts):
  """`(scale * gelu(x Wg + bg) * (x Wi + bi)) Wo + bo`, with `scale` [F] initialised to ones.

  Weights and biases start as U(-1/sqrt(n), 1/sqrt(n)), where n is the number of outputs (2F for Wi and Wg together).
  st-moe-pytorch uses the exact gelu; here it is the tanh approximation. Config: `hidden`, int(4*D*2/3) in
  st-moe-pytorch.
  """

  def __init__(self, *, dim: int, num_experts: int | None, dtype, rngs: nnx.Rngs, hidden: Count):
    super().__init__(dim=dim, num_experts=num_experts, dtype=dtype, rngs=rngs, hidden=hidden,
                     activation='geglu', use_bias=True)
    for name, outputs in dict(wi=2 * hidden, wg=2 * hidden, bi=2 * hidden, bg=2 * hidden, wo=dim, bo=dim).items():
      old = getattr(self, name)
      bound = 1 / math.sqrt(outputs)
      init = lambda key, shape, dtype, bound=bound: jax.random.uniform(key, shape, dtype, -bound, bound)
      setattr(self, name, functional.parameter(rngs, init, old.shape, old.get_metadata()['axes']))
    lead, axes = ((), ('mlp',)) if num_experts is None else ((num_experts,), ('expert', 'expert_mlp'))
    self.scale = functional.parameter(rngs, nnx.initializers.ones, (*lead, hidden), axes)

  def scaled(self, hidden: Float[Array, '... F'], layout: Layout) -> Float[Array, '... F']:
    """hidden: <float>[..,F] in `layout`."""
    return hidden * layout.per_row(self.scale[...].astype(hidden.dtype))

  def block(self, train: bool) -> None:
    """None: kernels do not scale hidden units."""
    return None
