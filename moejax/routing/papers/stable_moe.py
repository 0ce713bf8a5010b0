"""StableMoE: routing is learned early, distilled into a router of token ids, and then frozen."""
import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from moejax import functional
from moejax.ranges import Count, NonNegative
from moejax.routing.inputs import RouterInputs
from moejax.routing.logits import vectors
from moejax.routing.papers import paper
from moejax.routing.stages import BALANCERS, FEATURES, SCORES, Balancer, Feature, Routed, Score, Scores
from moejax.routing.valid_tokens import valid_mean

# wordemb, bigram_emb and cnn in the stablemoe code.
Words = Literal['unigram', 'bigram', 'convolution']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithIds:
  """Activations with token ids.

  Attributes:
    x: <float32>[G,S,D].
    inputs: with `token_ids` and the other fields that `word_vectors` reads.
  """
  x: Float32[Array, 'G S D']
  inputs: RouterInputs


@FEATURES('token_with_ids')
class TokenWithIds(Feature):
  """The activations and token ids, for score 'distilled'."""

  with_ids = True

  def __init__(self, *, dim: int):
    self.width = dim

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> WithIds:
    """`x`: <float>[G,S,D]."""
    return WithIds(x.astype(jnp.float32), inputs)


def word_vectors(words: Words, inputs: RouterInputs, table: Float32[Array, 'V W'],
                 kernel: Float32[Array, '5'] | None) -> Float32[Array, 'G S W']:
  """z, the distilled router's input: embeddings of the token's word, and maybe of the preceding words.

  'unigram': its own; 'bigram': the mean of its own and the previous word's, at the start of a document its own;
  'convolution': `sum_j kernel_j table[word j positions earlier]`, j = 0..4, excluding words of other documents.

  Args:
    words: one of these.
    inputs: ids <int32>[G,S] of the tokens and of the preceding ones.
    table: <float32>[V,W].
    kernel: <float32>[5] for 'convolution'.

  Returns:
    <float32>[G,S,W].

  Raises:
    ConfigError: the model supplies no ids, or no ids of earlier tokens.
  """
  ids = inputs['token_ids']
  if words == 'unigram':
    return table[ids]
  if words == 'bigram':
    return (table[ids] + table[jnp.where(inputs['positions'] == 0, ids, inputs['previous_ids'])]) / 2
  assert kernel is not None
  reach = jnp.concatenate([ids[..., None], inputs['earlier_ids']], axis=-1)
  taps = jnp.where(reach < 0, 0., kernel)
  return jnp.einsum('gsj,gsjw->gsw', taps, table[reach], precision=jax.lax.Precision.HIGHEST)


@SCORES('distilled')
class Distilled(Score):
  """Logits `h e` for weights; selection by them in stage 1, and by a router of word embeddings, `z e'`, in stage 2.

  Evaluation always selects by `z e'`. At the end of stage 1 the parameters of `z e'` are copied into the router's
  state, from which stage 2 reads them, so that the optimizer's momentum and weight decay cannot change routes. Returns
  `distilled` <float32>[G,S,E] (`z e'`, with gradients) and `stage_1` <bool>[] in `extras`.

  Config:
    vocab_size: V.
    stage_1_steps: training steps of stage 1.
    width: width of the word embeddings.
    words: the form of z, see `word_vectors`. (The published code can also distil into a Transformer over ids, which
      would need the whole document, whereas a router sees a group of tokens.)
    gain: gain of the orthogonal initialisation of e and e'.
  """

  gives = ('distilled', 'stage_1')
  with_ids = True

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, vocab_size: Count,
               stage_1_steps: Count, width: Count = 50, words: Words = 'unigram', gain: NonNegative = 0.1):
    dim = vectors(dim)
    self.stage_1_steps = stage_1_steps
    self.words: Words = words
    orthogonal, normal = nnx.initializers.orthogonal(gain), nnx.initializers.normal(1.)
    self.experts = functional.parameter(rngs, orthogonal, (num_experts, dim), (None, 'embed'))
    self.words_table = functional.parameter(rngs, normal, (vocab_size, width), ('vocab', None))
    self.words_experts = functional.parameter(rngs, orthogonal, (num_experts, width), (None, None))
    convolution = words == 'convolution'
    self.words_kernel = functional.parameter(rngs, _uniform, (5,), (None,)) if convolution else None
    self.step = functional.router_state(jnp.zeros((), jnp.int32), ())
    self.frozen_table = functional.router_state(jnp.zeros((vocab_size, width)), ('vocab', None))
    self.frozen_experts = functional.router_state(jnp.zeros((num_experts, width)), (None, None))
    self.frozen_kernel = functional.router_state(jnp.zeros(5), (None,)) if convolution else None

  def __call__(self, features: WithIds, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: from 'token_with_ids'."""
    logits = _product(features.x, self.experts[...])
    now = self._live_or_frozen()
    z = word_vectors(self.words, features.inputs, now['table'], now.get('kernel'))
    distilled = _product(z, now['experts'])
    stage_1 = self.step[...] < self.stage_1_steps
    select = jnp.where(stage_1, logits, distilled) if train else distilled
    return Scores(logits=logits, select=select, clean=logits, extras=dict(distilled=distilled, stage_1=stage_1))

  def update(self) -> dict[str, Any]:
    """The next step, and the frozen parameters for stage 2."""
    return dict(step=self.step[...] + 1, **{f'frozen_{name}': leaf for name, leaf in self._live_or_frozen().items()})

  def _live_or_frozen(self):
    # The first step of stage 2 still reads the parameters, as left by the last step of stage 1.
    live = self.step[...] <= self.stage_1_steps
    names = ('table', 'experts') if self.words_kernel is None else ('table', 'experts', 'kernel')
    return {name: jnp.where(live, getattr(self, f'words_{name}')[...], getattr(self, f'frozen_{name}')[...])
            for name in names}


def _uniform(key, shape, dtype):
  # Variance 1 / (3 * 5), PyTorch's initialisation of a kernel of size five.
  return jax.random.uniform(key, shape, dtype, -5**-0.5, 5**-0.5)


def _product(x, experts):
  return jnp.einsum('gsd,ed->gse', x, experts, precision=jax.lax.Precision.HIGHEST)


def distillation_loss(distilled: Float32[Array, 'G S E'], taught: Int[Array, 'G S'],
                      valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """Mean cross entropy of the word router with the greedy choice as target (StableMoE, section 3.2).

  Args:
    distilled: <float32>[G,S,E], `z e'`.
    taught: <int32>[G,S], the expert with the largest `h e`.
    valid: <bool>[G,S].
  """
  log_probs = jax.nn.log_softmax(distilled, axis=-1)
  entropy = -jnp.take_along_axis(log_probs, taught[..., None], axis=-1)[..., 0]
  return valid_mean(entropy, valid)


def balance_loss(logits: Float32[Array, 'G S E'], expert: Int[Array, 'G S'],
                 valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """`1/T sum_e (n_e - n)/n sum_{t of e} sigmoid(h_t e)`: expert e has n_e tokens, n is the mean (StableMoE, eq. 6).

  0 if all experts have the same number of tokens. The gradient lowers the scores of experts above their share and
  raises the others. The paper sums over tokens, as in its language model's loss; here both are means.

  Args:
    logits: <float32>[G,S,E], `h e`.
    expert: <int32>[G,S] the greedy choice.
    valid: <bool>[G,S].
  """
  chosen = (expert[..., None] == jnp.arange(logits.shape[-1])) & valid[..., None]
  load = chosen.sum(1)
  mean = jnp.maximum(load.mean(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  scores = jnp.sum(jnp.where(chosen, jax.nn.sigmoid(logits), 0), axis=1)
  return jnp.sum((load - mean) / mean * scores) / jnp.maximum(valid.sum(), 1)


class _InStage1(Balancer):
  """A loss of stage 1: exactly 0, with a gradient of exactly 0, afterwards."""

  reads = ('distilled', 'stage_1')

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    scores = routed.scores
    greedy = jnp.argmax(scores.logits, axis=-1)
    return jnp.where(scores.extras['stage_1'], self.of(scores, greedy, routed.valid), 0.)

  def of(self, scores: Scores, greedy: jax.Array, valid: jax.Array) -> jax.Array:
    """The loss in stage 1. greedy: <int32>[G,S]."""
    raise NotImplementedError


@BALANCERS('distillation')
class Distillation(_InStage1):
  """See `distillation_loss`."""

  def of(self, scores, greedy, valid):
    return distillation_loss(scores.extras['distilled'], greedy, valid)


@BALANCERS('stable_moe')
class Balance(_InStage1):
  """See `balance_loss`."""

  def of(self, scores, greedy, valid):
    return balance_loss(scores.logits, greedy, valid)


@paper('StableMoE: Stable Routing Strategy for Mixture of Experts', '2204.08396',
       example=dict(vocab_size=11, stage_1_steps=5, capacity_factor=1.), alone=dict(vocab_size=11, stage_1_steps=5))
def stable_moe(vocab_size: int, stage_1_steps: int, words: Words = 'unigram', capacity_factor: float = 2.,
               balance: float = 0.3, distillation: float = 0.3) -> dict[str, Any]:
  """StableMoE: Stable Routing Strategy for Mixture of Experts (arXiv 2204.08396).

  Section 3.2, stage 1 (a tenth of the paper's training): greedy routing by `h e` with a balance loss, distilled into
  a router of word embeddings of width 50 (`words`: the token's own, or also the preceding ones). Section 3.3, stage 2:
  the distilled router, frozen. The weight is the sigmoid of `h e` in both; the remaining share of the token bypasses
  the expert: use experts `residual_stack`, inserted. As in the published code: both losses have coefficient 0.3,
  evaluation uses the distilled router in stage 1 too, and an expert takes at most twice its equal share.
  """
  return dict(
      features=dict(name='token_with_ids'),
      score=dict(name='distilled', vocab_size=vocab_size, stage_1_steps=stage_1_steps, words=words),
      select=dict(name='top_k', k=1),
      weigh=dict(name='sigmoid', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor),
      balance=dict(stable_moe=dict(coefficient=balance), distillation=dict(coefficient=distillation)))
