"""Scores: a router's logits for every token and expert, always in float32 whatever the dtype of the activations.

A score is a `Score` with `__call__(features, *, key, train) -> Scores`. Noise and jitter are added here, in training
only.
"""
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from moejax import functional
from moejax.config import ConfigError, Registry
from moejax.random import derive
from moejax.ranges import Count, Fraction, NonNegative, Rate
from moejax.routing.plans import Leak


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """Output of the score stage, in float32.

  Attributes:
    logits: <float32>[G,S,E] with noise; weights are computed from them. For Soft MoE one per slot, [G,S,E,C].
    select: <float32>[G,S,E] ranking for the selection; the logits unless a stage (a balancing bias) changes it.
    clean: <float32>[G,S,E] the logits before noise, for the importance loss and the z-loss.
    noise_std: <float32> scalar or [G,S,E]: standard deviation of the noise; None without noise, as at evaluation.
    extras: additional outputs by name, for selections and balancers made for the score.
  """
  logits: jax.Array
  select: jax.Array
  clean: jax.Array
  noise_std: jax.Array | None = None
  extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Score(nnx.Module):
  """Base class of scores.

  Attributes:
    noisy: it adds Gaussian noise and reports its standard deviation, which the load loss needs.
    slots: its logits are [G,S,E,slots] (Soft MoE); None: [G,S,E].
    gives: the keys it sets in `Scores.extras` for other stages.
    with_ids: it needs activations and token ids (features 'token_with_ids').
    leak: how the scores depend on later tokens.
  """

  noisy: bool = False
  slots: int | None = None
  gives: tuple[str, ...] = ()
  with_ids: ClassVar[bool] = False
  leak: ClassVar[Leak] = 'causal'

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,width] or <int32>[G,S]."""
    raise NotImplementedError

  def update(self) -> dict[str, Any]:
    """New values of this module's state (`functional.router_state`) after a training step, by name.

    They depend only on parameters and state. State that depends on the batch is updated by `functional.Statistics`.
    """
    return {}


SCORES = Registry('router score', Score, context=('dim', 'num_experts', 'rngs'))


def noiseless(logits: jax.Array, extras: Mapping[str, jax.Array] = {}) -> Scores:
  """Scores without noise: `logits` throughout."""
  return Scores(logits=logits, select=logits, clean=logits, extras=dict(extras))


def gaussian(clean: jax.Array, noise_std: float, key: jax.Array, extras: Mapping[str, jax.Array] = {}) -> Scores:
  """`clean` logits <float32>[G,S,E] plus Gaussian noise with the same standard deviation for all."""
  logits = clean + noise_std * jax.random.normal(key, clean.shape)
  return Scores(logits=logits, select=logits, clean=clean, noise_std=jnp.float32(noise_std), extras=dict(extras))


def required(key: jax.Array | None, what: str) -> jax.Array:
  """Returns `key`; raises ValueError if it is None, since training without the configured noise is another router."""
  if key is None:
    raise ValueError(f'{what} draws random numbers in training: call the router with key=..., or with train=False.')
  return key


def vectors(dim: int | None, where: str) -> int:
  """The width of the features; raises ConfigError if they are ids."""
  if dim is None:
    raise ConfigError(f'{where}: needs vectors, but the features are ids. '
                      "Remove features=dict(name='token_ids'), or score by 'hash'.")
  return dim


def product(features: jax.Array, kernel: jax.Array) -> jax.Array:
  """<float32>[G,S,D], <float32>[D,E] -> <float32>[G,S,E], in float32 on every platform."""
  # The default precision of a float32 product is bfloat16 on TPU and TF32 on GPU.
  return jnp.einsum('gsd,de->gse', features, kernel, precision=jax.lax.Precision.HIGHEST)


def uniform_within(bound: float) -> nnx.Initializer:
  """The initialisation of torch's Linear, kernel and bias, where `bound` is 1/sqrt(number of inputs)."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


InitStd = NonNegative | Literal['1/sqrt(D)', 'torch_linear', 'xavier', 'xavier/2']
_INITS = {
    '1/sqrt(D)': nnx.initializers.lecun_normal(),
    'xavier': nnx.initializers.xavier_uniform(),
    'xavier/2': nnx.initializers.variance_scaling(0.25, 'fan_avg', 'uniform'),
}


@SCORES('linear')
class Linear(Score):
  """`x W (+ b)`, with the noises in common use.

  Config:
    init_std: initial standard deviation of W (0: all experts equal), or '1/sqrt(D)' (lecun normal; V-MoE),
      'torch_linear' (uniform within 1/sqrt(D), the bias too: standard deviation 1/sqrt(3D)), 'xavier' (Glorot uniform,
      as in Keras) or 'xavier/2' (the same with gain 1/2; SpeechMoE).
    bias: adds a bias, initially zero except with 'torch_linear'.
    jitter: multiplies the features by U(1-jitter, 1+jitter) in training (Switch Transformer, appendix C).
    dropout: dropout rate of the features in training (Switch Transformer, appendix C).
    noise_std: standard deviation of Gaussian noise on the logits in training; '1/E' is V-MoE's.
    logit_jitter: adds U(-jitter, jitter) to the logits in training (FastMoE's Switch gate).
  """

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs,
               init_std: InitStd = 0.02, bias: bool = False, jitter: Fraction = 0.,
               dropout: Rate = 0., noise_std: NonNegative | Literal['1/E'] = 0., logit_jitter: NonNegative = 0.):
    dim = vectors(dim, where)
    bias_init = nnx.initializers.zeros
    if init_std == 'torch_linear':
      init = bias_init = uniform_within(dim**-0.5)
    else:
      init = _INITS[init_std] if init_std in _INITS else nnx.initializers.normal(init_std)
    self.kernel = functional.parameter(rngs, init, (dim, num_experts), ('embed', None))
    self.bias = functional.parameter(rngs, bias_init, (num_experts,), (None,)) if bias else None
    self.jitter, self.dropout, self.logit_jitter = jitter, dropout, logit_jitter
    self.noise_std = 1 / num_experts if noise_std == '1/E' else noise_std
    self.noisy = self.noise_std > 0

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]. The clean logits include input jitter and dropout."""
    if train and (self.jitter or self.dropout or self.noisy or self.logit_jitter):
      jitter_key, noise_key = jax.random.split(required(key, 'score "linear" with noise'))
    if train and self.jitter:
      features *= jax.random.uniform(jitter_key, features.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
    if train and self.dropout:
      keep = jax.random.bernoulli(derive(key, 'dropout'), 1 - self.dropout, features.shape)
      features = jnp.where(keep, features / (1 - self.dropout), 0)
    clean = product(features, self.kernel[...])
    if self.bias is not None:
      clean += self.bias[...]
    if not train:
      return noiseless(clean)
    logits = clean
    if self.logit_jitter:
      logits += jax.random.uniform(derive(key, 'logits'), clean.shape, minval=-self.logit_jitter,
                                   maxval=self.logit_jitter)
    if not self.noisy:
      return Scores(logits=logits, select=logits, clean=clean)
    return dataclasses.replace(gaussian(logits, self.noise_std, noise_key), clean=clean)


def soft_moe_logits(x: jax.Array, phi: jax.Array, scale: jax.Array) -> jax.Array:
  """`scale * <x/|x|, phi/|phi|>` (Soft MoE, section 2.3; with 1e-6 inside the root as in google-research/vmoe).

  Args:
    x: <float32>[G,S,D].
    phi: <float32>[D,E,C].
    scale: <float32> scalar.

  Returns:
    <float32>[G,S,E,C].
  """
  x *= jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
  phi *= scale * jax.lax.rsqrt(jnp.sum(phi**2, axis=0, keepdims=True) + 1e-6)
  return jnp.einsum('gsd,dec->gsec', x, phi, precision=jax.lax.Precision.HIGHEST)


@SCORES('soft_moe')
class SoftMoE(Score):
  """Cosine of tokens and slots times a learned scale (Soft MoE, section 2.3). `slots`: C, slots per expert.

  Slots are initialised with lecun normal of [D,E,C], of standard deviation 1/sqrt(D*E), as in google-research/vmoe:
  only their directions matter, but the shorter they are, the faster Adam turns them.
  """

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, slots: Count = 1):
    dim = vectors(dim, where)
    self.slots = slots
    self.phi = functional.parameter(rngs, nnx.initializers.lecun_normal(), (dim, num_experts, slots),
                                    ('embed', None, None))
    self.scale = functional.parameter(rngs, nnx.initializers.ones, (), ())

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]; logits [G,S,E,C]."""
    return noiseless(soft_moe_logits(features, self.phi[...], self.scale[...]))
