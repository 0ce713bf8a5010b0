"""Random routing, independent of the input."""
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from moejax import functional
from moejax.config import ConfigError
from moejax.routing.features.sentence import document_numbers
from moejax.routing.stages import SCORES, Score, Scores, noiseless, required

Share = Literal['token', 'document', 'batch']


@SCORES('random')
class Random(Score):
  """Independent Gumbel logits: all experts are equally likely for every token.

  Evaluation derives its key from `seed` and the layer, so its results are reproducible.

  Config:
    per: unit of a draw in training: one per 'token', per 'document' (needs features=dict(name='documents')), or one for
      the whole 'batch', as in THOR.
    eval_per: the same at evaluation; None: as in training.
    seed: seed of the draws at evaluation.
  """

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, per: Share = 'token',
               eval_per: Share | None = None, seed: int = 0):
    self.num_experts, self.seed = num_experts, seed
    self.per = {True: per, False: per if eval_per is None else eval_per}
    if 'document' in self.per.values() and dim is not None:
      raise ConfigError(": a draw per document needs document ids. Set features=dict(name='documents').")
    # Layers share a config but must draw independently.
    self.layer = functional.router_state(jax.random.randint(rngs.params(), (), 0, 2**16), ())

  def __call__(self, features: Shaped[Array, 'G S ...'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D] or <int32>[G,S]; only their shape is used, unless they are document ids."""
    key = required(key, 'score "random"') if train else jax.random.fold_in(jax.random.key(self.seed), self.layer[...])
    shape = (*features.shape[:2], self.num_experts)
    if self.per[train] == 'batch':
      return noiseless(jnp.broadcast_to(jax.random.gumbel(key, shape[2:]), shape))
    draws = jax.random.gumbel(key, shape)
    if self.per[train] == 'document':
      draws = jnp.take_along_axis(draws, document_numbers(features)[..., None], axis=1)
    return noiseless(draws)

  def update(self) -> dict[str, Any]:
    return {'layer': self.layer[...]}
