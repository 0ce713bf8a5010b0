"""Features and scores: what a router looks at, and what it thinks of every token and expert.

A feature is a class with a static `width` (`None`: whole numbers) and `__call__(x, inputs) -> <float32>[G,S,width]` or
`<int32>[G,S]`. A score is a class with two static attributes,

    noisy  bool: it adds Gaussian noise whose standard deviation it reports (the load loss needs it),
    slots  int | None: its logits are [G,S,E,slots] (Soft MoE) or [G,S,E],

and `__call__(features, *, key, train) -> Scores`. All of it is float32, whatever the dtype of the activations. Noise
and jitter live here, in training only.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from moejax import functional
from moejax.config import ConfigError, Registry

FEATURES = Registry('router feature')
SCORES = Registry('router score')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterInputs:
  """What a router may look at besides the activations. Absent fields are None.

  Attributes:
    token_ids: <int32>[G,S] ids of the input tokens (hash routers).
    valid: <bool>[G,S] False for padding: it is not dispatched, takes no capacity and counts in no loss.
    positions: <int32>[G,S] position of the token in its sequence.
  """
  token_ids: jax.Array | None = None
  valid: jax.Array | None = None
  positions: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """What the score stage says about every token and expert, in float32.

  Attributes:
    logits: <float32>[G,S,E] with noise; what weights are made of. For Soft MoE one for each slot, [G,S,E,C].
    select: <float32>[G,S,E] what selection ranks by; the logits unless a stage (a balancing bias) separates the two.
    clean: <float32>[G,S,E] the logits before noise; what the importance loss and the z-loss see.
    noise_std: <float32> scalar or [G,S,E]: standard deviation of the noise added, or None (no noise: evaluation).
  """
  logits: jax.Array
  select: jax.Array
  clean: jax.Array
  noise_std: jax.Array | None = None


def noiseless(logits: jax.Array) -> Scores:
  """Scores that are `logits` for every purpose."""
  return Scores(logits=logits, select=logits, clean=logits)


def required(key: jax.Array | None, what: str) -> jax.Array:
  """`key`, or a ValueError: training without the randomness a router was configured with is another router."""
  if key is None:
    raise ValueError(f'{what} draws random numbers in training: call the router with key=..., or with train=False.')
  return key


@FEATURES('token')
class Token:
  """The activations themselves."""

  def __init__(self, *, dim: int):
    self.width = dim

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D]."""
    return x.astype(jnp.float32)


@FEATURES('token_ids')
class TokenIds:
  """The ids of the input tokens."""

  width = None

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """-> <int32>[G,S]. Raises ValueError where the model supplies no ids."""
    if inputs.token_ids is None:
      raise ValueError('the router looks at token ids, but the model gave it none (RouterInputs.token_ids is None).')
    return inputs.token_ids


def _vectors(dim: int | None, where: str) -> int:
  if dim is None:
    raise ConfigError(f'{where}: needs vectors, but the features are whole numbers. '
                      "Remove features=dict(name='token_ids'), or score by 'hash'.")
  return dim


@SCORES('linear')
class Linear(nnx.Module):
  """`x W (+ b)`, with the two kinds of noise in use.

  Config:
    init_std: standard deviation of W at the start (0: all experts equal), or '1/sqrt(D)' (lecun normal; V-MoE).
    bias: adds a bias, zero at the start.
    jitter: multiplies the features by U(1-jitter, 1+jitter) in training (Switch Transformer, appendix C).
    noise_std: standard deviation of Gaussian noise on the logits in training; '1/E' is V-MoE's.
  """

  slots = None

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs,
               init_std: float | Literal['1/sqrt(D)'] = 0.02, bias: bool = False, jitter: float = 0.,
               noise_std: float | Literal['1/E'] = 0.):
    dim = _vectors(dim, where)
    init = nnx.initializers.lecun_normal() if init_std == '1/sqrt(D)' else nnx.initializers.normal(init_std)
    self.kernel = functional.parameter(rngs, init, (dim, num_experts), ('embed', None))
    self.bias = functional.parameter(rngs, nnx.initializers.zeros, (num_experts,), (None,)) if bias else None
    self.jitter = jitter
    self.noise_std = 1 / num_experts if noise_std == '1/E' else noise_std
    self.noisy = self.noise_std > 0

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]. The clean logits are those before Gaussian noise, jittered or not."""
    if train and (self.jitter or self.noisy):
      jitter_key, noise_key = jax.random.split(required(key, 'score "linear" with noise'))
    if train and self.jitter:
      features *= jax.random.uniform(jitter_key, features.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
    # The default precision of a float32 product is bfloat16 on TPU and TF32 on GPU.
    clean = jnp.einsum('gsd,de->gse', features, self.kernel[...], precision=jax.lax.Precision.HIGHEST)
    if self.bias is not None:
      clean += self.bias[...]
    if not (train and self.noisy):
      return noiseless(clean)
    logits = clean + self.noise_std * jax.random.normal(noise_key, clean.shape)
    return Scores(logits=logits, select=logits, clean=clean, noise_std=jnp.float32(self.noise_std))


def soft_moe_logits(x: jax.Array, phi: jax.Array, scale: jax.Array) -> jax.Array:
  """`scale * <x/|x|, phi/|phi|>` (Soft MoE, section 2.3; the 1e-6 inside the root is that of google-research/vmoe).

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
class SoftMoE(nnx.Module):
  """Cosine between tokens and slots times a learned scale (Soft MoE, section 2.3). `slots`: slots an expert, C."""

  noisy = False

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, slots: int = 1):
    dim = _vectors(dim, where)
    if slots < 1:
      raise ConfigError(f'{where}.slots is {slots}: every expert needs at least one slot.')
    self.slots = slots
    self.phi = functional.parameter(rngs, nnx.initializers.normal(dim**-0.5), (dim, num_experts, slots),
                                    ('embed', None, None))
    self.scale = functional.parameter(rngs, nnx.initializers.ones, (), ())

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]; logits [G,S,E,C]."""
    return noiseless(soft_moe_logits(features, self.phi[...], self.scale[...]))


HashTable = Literal['random', 'balanced', 'modulo']


@functools.lru_cache(maxsize=64)
def hash_table(table: HashTable, vocab_size: int, num_experts: int, seed: int = 0,
               frequencies: tuple[float, ...] | None = None) -> np.ndarray:
  """The expert of every token id (Hash Layers, section 3.1; 'modulo' is that of 'Unified scaling laws').

  Args:
    table: 'random' draws every expert independently; 'balanced' gives the ids, most frequent first, each to the expert
      with the least mass so far; 'modulo' is the id modulo E.
    vocab_size: V.
    num_experts: E.
    seed: of 'random', and of the order among equally frequent ids of 'balanced'.
    frequencies: V counts for 'balanced'; None: all ids equally frequent.

  Returns:
    <int32>[V].
  """
  if table == 'modulo':
    return np.arange(vocab_size, dtype=np.int32) % num_experts
  generator = np.random.default_rng(seed)
  if table == 'random':
    return generator.integers(num_experts, size=vocab_size, dtype=np.int32)
  mass = np.ones(vocab_size) if frequencies is None else np.asarray(frequencies, float)
  shuffled = generator.permutation(vocab_size)
  experts, load = np.zeros(vocab_size, np.int32), np.zeros(num_experts)
  for token in shuffled[np.argsort(-mass[shuffled], kind='stable')]:
    experts[token] = np.argmin(load)
    load[experts[token]] += mass[token]
  return experts


@SCORES('hash')
class Hash:
  """A fixed expert for every token id; nothing to learn (Hash Layers, section 3). See `hash_table` for the keys."""

  noisy = False
  slots = None

  def __init__(self, *, where: str, dim: int | None, num_experts: int, vocab_size: int, table: HashTable = 'random',
               seed: int = 0, frequencies: Sequence[float] | None = None):
    if dim is not None:
      raise ConfigError(f"{where}: 'hash' looks at token ids. Set features=dict(name='token_ids').")
    if frequencies is not None and (table != 'balanced' or len(frequencies) != vocab_size):
      raise ConfigError(f"{where}.frequencies are for table='balanced', one for each of the {vocab_size} ids; "
                        f'here are {len(frequencies)} for table={table!r}.')
    self.num_experts = num_experts
    self.arguments = (table, vocab_size, num_experts, seed, None if frequencies is None else tuple(frequencies))

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <int32>[G,S] below V. The logits are a finite stand-in for the log of a one-hot."""
    expert = jnp.asarray(hash_table(*self.arguments))[features]
    one_hot = expert[..., None] == jnp.arange(self.num_experts)
    return noiseless(jnp.where(one_hot, 0., jnp.finfo(jnp.float32).min))


@SCORES('random')
class Random:
  """Independent Gumbel logits: every expert is as likely as any other, whatever the token.

  Evaluation draws from a key made of `seed`, so that it gives the same result every time.
  """

  noisy = False
  slots = None

  def __init__(self, *, num_experts: int, seed: int = 0):
    self.num_experts, self.seed = num_experts, seed

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D] or <int32>[G,S]; only their shape is used."""
    key = required(key, 'score "random"') if train else jax.random.key(self.seed)
    return noiseless(jax.random.gumbel(key, (*features.shape[:2], self.num_experts)))
