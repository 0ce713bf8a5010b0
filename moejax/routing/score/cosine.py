"""Cosine scores between a token, optionally projected to a few dimensions, and one embedding per expert.

Codebases agree only on the product, so every other choice is a key:

                      X-MoE                     torchscale            Tutel (GMoE)
    projection        16, no bias               16, no bias           256, bias
    unit length       tokens and experts        experts               tokens and experts
    temperature       divides, at least 1e-4    none                  exp(min(theta, log 100)) multiplies
    starts at         0.07                                            0.5, that is theta = log 2
    experts start     orthogonal, gain 0.1      orthogonal, 0.32      normal, 0.01
"""
import math
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.config import ConfigError
from moejax.ranges import Count, NonNegative, Positive
from moejax.routing.logits import uniform_within, vectors
from moejax.routing.stages import SCORES, Score, Scores, gaussian, noiseless, required

Normalize = Literal['both', 'experts', 'none']
Temperature = Literal['none', 'divide', 'exponential']
LEAST_TEMPERATURE = 1e-4
LARGEST_SCALE = 100.


def unit(x: Float32[Array, '... D'], epsilon: float) -> Float32[Array, '... D']:
  """<float32>[..,D] divided by max(length, `epsilon`), as torch's `normalize`."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), epsilon**2))


def cosines(x: Float32[Array, 'G S D'], experts: Float32[Array, 'E D'], normalize: Normalize,
            epsilon: float) -> Float32[Array, 'G S E']:
  """Products of tokens and expert embeddings, with the sides in `normalize` scaled to unit length (X-MoE, equation 5).

  Args:
    x: <float32>[G,S,D].
    experts: <float32>[E,D].
    normalize: 'both', 'experts', or 'none' (the logits of a linear router).
    epsilon: see `unit`.

  Returns:
    <float32>[G,S,E].
  """
  if normalize == 'both':
    x = unit(x, epsilon)
  if normalize != 'none':
    experts = unit(experts, epsilon)
  return jnp.einsum('gsd,ed->gse', x, experts, precision=jax.lax.Precision.HIGHEST)


def rescaled(rows: Float32[Array, 'E D'], length: float) -> Float32[Array, 'E D']:
  """<float32>[E,D] with rows rescaled to `length`; gradients pass unchanged, as if the rows were stored rescaled."""
  return rows + jax.lax.stop_gradient(length * unit(rows, 1e-12) - rows)


@SCORES('cosine')
class Cosine(Score):
  """Cosines of projected tokens and expert embeddings, divided by a temperature. Returns the cosines in `extras`.

  Config:
    project: width of the projection of tokens; None: no projection.
    project_bias: adds a bias to the projection. Both are initialised like torch's Linear, uniform within 1/sqrt(D).
    normalize: the sides of unit length; see `cosines`.
    epsilon: smallest length to divide by: 1e-4 in X-MoE, 1e-12 in Tutel.
    temperature: 'divide': learns a temperature that divides; 'exponential': learns the logarithm of a scale that
      multiplies, at most 100; 'none': the temperature is 1.
    temperature_init: its initial value, in either form.
    init: initialisation of expert embeddings: 'orthogonal' or 'normal', with `init_scale`.
    rescale: length to which expert embeddings are rescaled at every use, or None. torchscale rescales them in storage.
    noise_std: as for score 'linear'.
    init_scale: gain or standard deviation of `init`.
  """

  gives = ('cosine',)

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, project: Count | None = None,
               project_bias: bool = False, normalize: Normalize = 'both', epsilon: Positive = 1e-4,
               temperature: Temperature = 'none', temperature_init: Positive = 0.07,
               init: Literal['orthogonal', 'normal'] = 'orthogonal', init_scale: Positive = 0.1,
               rescale: Positive | None = None, noise_std: NonNegative | Literal['1/E'] = 0.):
    dim = vectors(dim)
    if project is None and project_bias:
      raise ConfigError('.project_bias: there is no projection to add a bias to. Set project, or remove it.')
    width = dim if project is None else project
    start = uniform_within(dim**-0.5)
    self.kernel = None if project is None else functional.parameter(rngs, start, (dim, width), ('embed', None))
    self.bias = functional.parameter(rngs, start, (width,), (None,)) if project_bias else None
    draw = nnx.initializers.orthogonal(init_scale) if init == 'orthogonal' else nnx.initializers.normal(init_scale)
    self.experts = functional.parameter(rngs, draw, (num_experts, width), (None, None))
    start = {'divide': temperature_init, 'exponential': -math.log(temperature_init)}
    self.temperature = None if temperature == 'none' else functional.parameter(
        rngs, nnx.initializers.constant(start[temperature]), (), ())
    self.form, self.epsilon, self.rescale = temperature, epsilon, rescale
    self.normalize: Normalize = normalize
    self.noise_std = 1 / num_experts if noise_std == '1/E' else noise_std
    self.noisy = self.noise_std > 0

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]."""
    x = features
    if self.kernel is not None:
      x = jnp.einsum('gsd,dp->gsp', x, self.kernel[...], precision=jax.lax.Precision.HIGHEST)
    if self.bias is not None:
      x += self.bias[...]
    experts = self.experts[...] if self.rescale is None else rescaled(self.experts[...], self.rescale)
    similar = cosines(x, experts, self.normalize, self.epsilon)
    clean = similar * self.scale()
    extras = dict(cosine=similar)
    if not (train and self.noisy):
      return noiseless(clean, extras)
    return gaussian(clean, self.noise_std, required(key, 'score "cosine" with noise'), extras)

  def scale(self) -> Float32[Array, ''] | float:
    """The factor of the cosines."""
    if self.temperature is None:
      return 1.
    if self.form == 'divide':
      return 1 / jnp.maximum(self.temperature[...], LEAST_TEMPERATURE)
    return jnp.exp(jnp.minimum(self.temperature[...], math.log(LARGEST_SCALE)))
