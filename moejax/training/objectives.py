"""What training minimises: an objective over the model's output, plus the losses of its routers.

    config.objective = dict(name='classification', loss='softmax', label_smoothing=0.1, router_losses='mean')
"""
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from moejax.config import ConfigError, Registry, config_path
from moejax.layers import ctc
from moejax.ranges import NonNegative, Rate

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def build(config: Mapping, where: str) -> 'Objective':
  """The objective that `config` names."""
  return OBJECTIVES.build(config, where)


@dataclasses.dataclass(frozen=True)
class Objective:
  """Attributes:
    where: its config path, for errors while it runs.
    router_losses: whether the losses of all layers' routers are summed, or averaged over layers.
    needs: keys that a batch must have: one of each tuple.
  """
  needs: ClassVar[tuple[tuple[str, ...], ...]]
  where: str = dataclasses.field(init=False, default_factory=config_path)
  router_losses: Literal['sum', 'mean'] = 'sum'

  def counted(self, batch: Batch) -> jax.Array:
    """[B] or [B,S] Mask of the examples or tokens of `batch` over which the loss is a mean.

    Raises:
      ConfigError: the loss is not such a mean.
    """
    raise ConfigError(f"{self.where}: {type(self).__name__} does not score examples or tokens one by one, as "
                      "config.method requires. Set config.method.name to 'plain', or choose another objective.")

  def weight(self, batch: Batch) -> jax.Array:
    """<float32>[] The number of counted examples or tokens."""
    return self.counted(batch).astype(jnp.float32).sum()

  def mean(self, values: jax.Array, batch: Batch) -> jax.Array:
    """The mean of `values` <float>[B] or [B,S] over the counted examples or tokens."""
    return _mean(values, self.counted(batch))

  def __call__(self, output: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
    """(loss, metrics) of a `ModelOutput`: means over the counted examples or tokens, without router losses."""
    raise NotImplementedError

  def router_loss(self, output: Any) -> jax.Array:
    """<float32>[] The router losses, summed or averaged over layers; each already includes its coefficient."""
    layers: list[Any] = [sum(router.losses.values(), jnp.float32(0)) for router in output.routers.values()]
    total: Any = sum(layers, jnp.float32(0))
    return total / len(layers) if layers and self.router_losses == 'mean' else total


OBJECTIVES = Registry('objective', Objective)


@OBJECTIVES('classification')
@dataclasses.dataclass(frozen=True)
class Classification(Objective):
  """Cross entropy of image classes.

  'softmax': one distribution over classes; several labels share it equally. 'sigmoid': one binary decision per
  class, summed over classes (the loss of V-MoE on JFT and of BiT-like multi-label pre-training).
  Label smoothing (Szegedy et al. 2016, section 7) mixes the target with the uniform distribution.

  Config:
    loss: 'softmax' or 'sigmoid'.
    label_smoothing: weight of the uniform distribution in the target.
  """
  needs = (('image',), ('label', 'labels'), ('valid',))
  loss: Literal['softmax', 'sigmoid'] = 'softmax'
  label_smoothing: Rate = 0.0

  def __post_init__(self):
    if self.loss == 'sigmoid' and self.label_smoothing:
      raise ConfigError('.label_smoothing is for loss="softmax"; set it to 0 for loss="sigmoid".')

  def counted(self, batch):
    return batch['valid']

  def __call__(self, output, batch):
    logits = output.logits.astype(jnp.float32)
    classes = logits.shape[-1]
    labels = batch['labels'] if 'labels' in batch else jax.nn.one_hot(batch['label'], classes)
    if self.loss == 'softmax':
      target = labels / jnp.maximum(labels.sum(-1, keepdims=True), 1)
      target = (1 - self.label_smoothing) * target + self.label_smoothing / classes
      entropy = optax.softmax_cross_entropy(logits, target)
    else:
      entropy = optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1)
    correct = jnp.take_along_axis(labels, logits.argmax(-1)[:, None], axis=-1)[:, 0] > 0
    loss = _mean(entropy, batch['valid'])
    return loss, {'cross_entropy': loss, 'accuracy': _mean(correct, batch['valid'])}


@dataclasses.dataclass(frozen=True)
class _Tokens(Objective):
  """Cross entropy of the next token, a mean over the tokens that `loss_mask` counts.

  `z_loss` * log(Z)^2 keeps the softmax's normaliser near 1 (PaLM, section 5).

  Config:
    z_loss: coefficient of log(Z)^2.
  """
  targets: ClassVar[str]
  z_loss: NonNegative = 0.0

  def counted(self, batch):
    return batch['loss_mask']

  def log_likelihood(self, output: Any, batch: Batch) -> jax.Array:
    """<float32>[B,S] Log-probability of every target."""
    log_probs = jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(log_probs, batch[self.targets][..., None], axis=-1)[..., 0]

  def __call__(self, output, batch):
    targets, mask = batch[self.targets], batch['loss_mask']
    logits = output.logits.astype(jnp.float32)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    entropy = log_normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = _mean(entropy, mask)
    metrics = {'cross_entropy': cross_entropy, 'accuracy': _mean(logits.argmax(-1) == targets, mask)}
    if not self.z_loss:
      return cross_entropy, metrics
    z_loss = _mean(jnp.square(log_normaliser), mask)
    return cross_entropy + self.z_loss * z_loss, {**metrics, 'z_loss': z_loss}


@OBJECTIVES('language_model')
@dataclasses.dataclass(frozen=True)
class LanguageModel(_Tokens):
  """Predicts each token from the tokens before it."""

  needs = (('tokens',), ('targets',), ('loss_mask',))
  targets = 'targets'


@OBJECTIVES('seq2seq')
@dataclasses.dataclass(frozen=True)
class Seq2Seq(_Tokens):
  """Predicts each token of the decoder from the tokens before it and from the encoder."""

  needs = (('encoder_tokens',), ('decoder_tokens',), ('decoder_targets',), ('loss_mask',))
  targets = 'decoder_targets'


@OBJECTIVES('contrastive')
@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
  """Which text of the batch belongs to each image, and which image to each text: the mean of two cross entropies.

  As ConVIRT (2010.00747), CLIP and LIMoE. All valid pairs of the batch are candidates, across devices.
  """
  needs = (('image',), ('tokens',), ('valid',))

  def weight(self, batch):
    return batch['valid'].astype(jnp.float32).sum()

  def __call__(self, output, batch):
    valid, metrics, losses = batch['valid'], {}, []
    for name, logits in (('image_to_text', output.logits), ('text_to_image', output.logits.T)):
      logits = jnp.where(valid[None], logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
      own = jnp.arange(len(logits))
      losses.append(_mean(optax.softmax_cross_entropy_with_integer_labels(logits, own), valid))
      metrics[f'{name}_accuracy'] = _mean(logits.argmax(-1) == own, valid)
    loss = sum(losses) / 2
    return loss, {'cross_entropy': loss, **metrics}


@OBJECTIVES('ctc')
@dataclasses.dataclass(frozen=True)
class CTC(Objective):
  """Connectionist temporal classification (Graves et al. 2006), a mean over utterances.

  `shared` is the coefficient of the same loss on the head of the model's shared network, where it has one. An utterance
  with too few frames for its labels counts as 0, as in tencent-ailab/3m-asr, whose coefficient is 0.01.

  Config:
    shared: coefficient of the loss of the model's shared network.
  """
  needs = (('frames',), ('segments',), ('targets',), ('loss_mask',))
  shared: NonNegative = 0.01

  def weight(self, batch):
    return _spoken(batch).astype(jnp.float32).sum()

  def __call__(self, output, batch):
    loss = _mean(ctc.loss(output.logits, **ctc.arguments(batch)), _spoken(batch))
    metrics = {'ctc_loss': loss}
    if 'shared_logits' in output.extras:
      shared = _mean(ctc.loss(output.extras['shared_logits'], **ctc.arguments(batch)), _spoken(batch))
      loss, metrics = loss + self.shared * shared, {**metrics, 'shared_ctc_loss': shared}
    return loss, metrics


def _spoken(batch: Batch) -> jax.Array:
  # <bool>[B]: False for padding rows.
  return (batch['segments'] > 0).any(-1)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  # A batch without any counted token has loss 0, not 0/0.
  weights = weights.astype(jnp.float32)
  return jnp.where(weights > 0, values * weights, 0.).sum() / jnp.maximum(weights.sum(), 1)
