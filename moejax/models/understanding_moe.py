"""Patch classifiers whose experts are sums of filters: the model of "Towards Understanding MoE" (2208.02813)."""
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import ConfigError, call
from moejax.functional import Tree
from moejax.layers.feed_forwards.moe import ExpertCount
from moejax.layers.stack import routers_of, updates_of
from moejax.layers.sublayer import Left
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS
from moejax.models.vision import Side, patchify
from moejax.random import derive
from moejax.ranges import Count, Divides, Positive
from moejax.routing import router as router_lib
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import SoftPlan
from moejax.routing.router import RouterOutput

Activation = Literal['cubic', 'linear']


def filter_experts(patches: jax.Array, kernel: jax.Array, bias: jax.Array, activation: Activation) -> jax.Array:
  """`f_e(x)_y`: sum of `(w . x_p + b)^3` over the J filters of class y and the P patches (equation 3.2, plus a bias).

  Args:
    patches: <float32>[B,P,D].
    kernel: <float32>[E,D,Y,J].
    bias: <float32>[E,Y,J].
    activation: 'linear' omits the cube.

  Returns:
    <float32>[B,E,Y].
  """
  response = jnp.einsum('bpd,edyj->bpeyj', patches, kernel) + bias
  return (response**3 if activation == 'cubic' else response).sum((1, 4))


class FilterExperts(nnx.Module):
  """The filters of all experts. Every expert computes every example: they are too small to be worth dispatching.

  Config:
    filters: J, filters per class.
    activation: see `filter_experts`.
    init_scale: multiplies PyTorch's initial values of a convolution, uniform within 1 / sqrt(D).
  """

  def __init__(self, *, num_experts: int, dim: int, num_classes: int, rngs: nnx.Rngs, filters: Count = 8,
               activation: Activation = 'cubic', init_scale: Positive = 1e-3):
    self.activation: Activation = activation
    limit = init_scale * dim**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    shape, axes = (num_classes, filters), (None, 'expert_mlp')
    self.kernel = functional.parameter(rngs, uniform, (num_experts, dim, *shape), ('expert', 'expert_embed', *axes))
    self.bias = functional.parameter(rngs, uniform, (num_experts, *shape), ('expert', *axes))

  def __call__(self, patches: jax.Array) -> jax.Array:
    """<float32>[B,P,D] -> <float32>[B,E,Y]."""
    return filter_experts(patches, self.kernel[...], self.bias[...], self.activation)


class FilterMixture(nnx.Module):
  """Routes whole examples by the sum of their patches.

  Config:
    num_experts: E.
    experts: see `FilterExperts`.
    router: the stages of the router (`moejax.routing`); it sees the sum of the patches.
  """

  def __init__(self, *, dim: int, num_classes: int, rngs: nnx.Rngs, num_experts: ExpertCount, experts: dict,
               router: dict):
    build: dict[str, Any] = dict(dim=dim, num_experts=num_experts, rngs=rngs)
    self.router = router_lib.build(router, '.router', **build)
    if self.router.select.reads_slots:
      raise ConfigError('.router: the slots of Soft MoE are mixtures of images, which have no class. Choose a router '
                        'that weighs experts per image.')
    self.experts = call(FilterExperts, experts, '.experts', num_classes=num_classes, **build)

  def __call__(self, patches: jax.Array, valid: jax.Array | None, *, key: jax.Array | None,
               train: bool) -> tuple[jax.Array, RouterOutput]:
    """patches: <float32>[B,P,D], valid: <bool>[B] -> (<float32>[B,Y], the router's output for one group of B)."""
    inputs = RouterInputs(valid=None if valid is None else valid[None])
    output = self.router(patches.sum(1)[None], inputs, key=derive(key, 'router'), train=train)
    with jax.named_scope('dispatch'):  # separates their work from the model's own
      scores = self.experts(patches)
    assert not isinstance(output.plan, SoftPlan)
    return jnp.einsum('be,bey->by', output.plan.to_dense().weight[0], scores), output


class OneLayer(nnx.Module):
  """Holds the mixture, so that its parameters have the same paths as in other models."""

  def __init__(self, moe: FilterMixture):
    self.moe = moe


@MODELS('patch_mixture')
class PatchMixture(nnx.Module):
  """Image classifier with a single sparse layer, whose tokens are whole images.

  Config keys:
    image_size, channels, patch_size, num_classes: sizes; patch_size divides image_size.
    moe: see `FilterMixture`.
    output: 'probabilities' applies a softmax to the scores, in addition to the objective's, as in the published code:
      with two classes the loss cannot fall below log(1 + 1/e) = 0.3133. 'logits' does not.
  """

  def __init__(self, *, rngs: nnx.Rngs, image_size: Side, patch_size: Annotated[Count, Divides('image_size')],
               num_classes: Count, moe: Mapping, channels: Count = 1,
               output: Literal['probabilities', 'logits'] = 'probabilities'):
    self.patch_size, self.output = patch_size, output
    mixture = call(FilterMixture, moe, '.moe', dim=patch_size**2 * channels, num_classes=num_classes, rngs=rngs)
    self.blocks = nnx.List([OneLayer(mixture)])

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: image <float>[B,H,W,C], and optionally valid <bool>[B]."""
    patches = patchify(batch['image'].astype(jnp.float32), self.patch_size)
    scores, routed = self.blocks[0].moe(patches, batch.get('valid'), key=key, train=train)
    logits = jax.nn.softmax(scores, axis=-1) if self.output == 'probabilities' else scores
    left = dict(moe=Left(routed))
    updates = {'blocks': {'0': changed}} if (changed := updates_of(left)) else {}
    return ModelOutput(logits, scores, routers_of('block_00', left), updates)
