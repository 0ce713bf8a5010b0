"""A router that looks at nothing: experts by chance."""
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from moejax import functional
from moejax.config import ConfigError
from moejax.routing.scores import SCORES, Score, Scores, noiseless, required
from moejax.routing.task_features import document_numbers

Share = Literal['token', 'document', 'batch']


@SCORES('random')
class Random(Score):
  """Independent Gumbel logits: every expert is as likely as any other, whatever the token.

  Evaluation draws from a key made of `seed` and the layer, so that it gives the same result every time.

  Config:
    per: what has a draw of its own in training: every 'token', every 'document' (needs features=dict(name='documents'))
      or the whole 'batch', as in THOR.
    eval_per: the same, at evaluation; None: as in training.
    seed: of the draws of evaluation.
  """

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, per: Share = 'token',
               eval_per: Share | None = None, seed: int = 0):
    self.num_experts, self.seed = num_experts, seed
    self.per = {True: per, False: per if eval_per is None else eval_per}
    if 'document' in self.per.values() and dim is not None:
      raise ConfigError(f"{where}: a draw for every document needs to know them. Set features=dict(name='documents').")
    # All layers have one config, and yet draws of their own.
    self.layer = functional.router_state(jax.random.randint(rngs.params(), (), 0, 2**16), ())

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D] or <int32>[G,S]; their shape is used, or the documents that they name."""
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
