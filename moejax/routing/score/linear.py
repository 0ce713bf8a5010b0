"""A linear router, with the noises in common use."""
import dataclasses
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.random import derive
from moejax.ranges import Fraction, NonNegative, Rate
from moejax.routing.logits import product, uniform_within, vectors
from moejax.routing.stages import SCORES, Score, Scores, gaussian, noiseless, required

InitStd = NonNegative | Literal['1/sqrt(D)', 'torch_linear', 'xavier', 'xavier/2']
_INITS = {
    '1/sqrt(D)': nnx.initializers.lecun_normal(),
    'xavier': nnx.initializers.xavier_uniform(),
    'xavier/2': nnx.initializers.variance_scaling(0.25, 'fan_avg', 'uniform'),
}


@SCORES('linear')
class LinearScore(Score):
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

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs,
               init_std: InitStd = 0.02, bias: bool = False, jitter: Fraction = 0.,
               dropout: Rate = 0., noise_std: NonNegative | Literal['1/E'] = 0., logit_jitter: NonNegative = 0.):
    dim = vectors(dim)
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

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]. The clean logits include input jitter and dropout."""
    if train and (self.jitter or self.dropout or self.noisy or self.logit_jitter):
      jitter_key, noise_key = jax.random.split(required(key, 'score "linear" with noise'))
    if train and self.jitter:
      features *= jax.random.uniform(jitter_key, features.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
    if train and self.dropout:
      dropout_key = derive(required(key, 'score "linear" with dropout'), 'dropout')
      keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, features.shape)
      features = jnp.where(keep, features / (1 - self.dropout), 0)
    clean = product(features, self.kernel[...])
    if self.bias is not None:
      clean += self.bias[...]
    if not train:
      return noiseless(clean)
    logits = clean
    if self.logit_jitter:
      logits_key = derive(required(key, 'score "linear" with logit_jitter'), 'logits')
      logits += jax.random.uniform(logits_key, clean.shape, minval=-self.logit_jitter, maxval=self.logit_jitter)
    if not self.noisy:
      return Scores(logits=logits, select=logits, clean=clean)
    return dataclasses.replace(gaussian(logits, self.noise_std, noise_key), clean=clean)
