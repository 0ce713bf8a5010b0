"""Mixtral in one file: from a config to a falling loss, in plain JAX.

    python examples/mixtral.py

A decoder whose feed-forward layers are mixtures of experts (Jiang et al. 2024, "Mixtral of Experts", arXiv 2401.04088).
`tests/models/test_mixtral_example.py` holds it equal to `moejax.models.decoder`, in outputs and gradients.

The name of an array ends in its axes:

    B sequences                   D width of the model          E experts
    S positions of a sequence     H heads of queries            K experts per token
    T tokens, B*S; in attention   N heads of keys and values    F hidden width of an expert
      the positions attended to   R query heads per key, H/N    M rows that experts compute, T*K
    V vocabulary                  P width of a head
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes that train in seconds on a CPU; in comments those of Mixtral 8x7B."""
  vocab: int = 256  # 32000
  dim: int = 64  # 4096
  layers: int = 2  # 32
  heads: int = 4  # 32
  kv_heads: int = 2  # 8
  head_dim: int = 16  # 128
  experts: int = 8  # 8
  experts_per_token: int = 2  # 2
  hidden: int = 64  # 14336
  rope_theta: float = 1e4  # 1e6
  epsilon: float = 1e-6  # 1e-5
  balance: float = 0.02  # 0.02


def init(config: Config, key: jax.Array) -> Params:
  """Normal weights of variance 1 / fan-in; embeddings and routers start smaller."""
  V, D, L, E, F = config.vocab, config.dim, config.layers, config.experts, config.hidden
  H, N, P = config.heads, config.kv_heads, config.head_dim
  keys = iter(jax.random.split(key, 2 + 8 * L))
  normal = lambda *shape, std: std * jax.random.normal(next(keys), shape)
  layer = lambda: dict(
      attention_norm_D=jnp.ones(D),
      query_DHP=normal(D, H, P, std=D ** -0.5),
      key_DNP=normal(D, N, P, std=D ** -0.5),
      value_DNP=normal(D, N, P, std=D ** -0.5),
      out_HPD=normal(H, P, D, std=(H * P) ** -0.5),
      experts_norm_D=jnp.ones(D),
      router_DE=normal(D, E, std=0.02),
      gate_EDF=normal(E, D, F, std=D ** -0.5),
      up_EDF=normal(E, D, F, std=D ** -0.5),
      down_EFD=normal(E, F, D, std=F ** -0.5))
  return dict(embedding_VD=normal(V, D, std=0.02), layers=[layer() for _ in range(L)],
              norm_D=jnp.ones(D), head_DV=normal(D, V, std=D ** -0.5))


def rms_norm(x_BSD, scale_D, config: Config):
  return x_BSD * jax.lax.rsqrt(jnp.square(x_BSD).mean(-1, keepdims=True) + config.epsilon) * scale_D


def rope(x_BSHP, config: Config):
  """Rotates pairs of features, one from each half of a head, by angles proportional to the position."""
  half = x_BSHP.shape[-1] // 2
  angle = jnp.arange(x_BSHP.shape[1])[:, None, None] * config.rope_theta ** (-jnp.arange(half) / half)  # [S,1,P/2]
  first, second = jnp.split(x_BSHP, 2, axis=-1)
  return jnp.concatenate([first * jnp.cos(angle) - second * jnp.sin(angle),
                          second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1)


def attention(layer: Params, x_BSD, config: Config):
  """Causal attention; R query heads share each head of keys and values."""
  query_BSHP = rope(jnp.einsum('BSD,DHP->BSHP', x_BSD, layer['query_DHP']), config)
  key_BTNP = rope(jnp.einsum('BTD,DNP->BTNP', x_BSD, layer['key_DNP']), config)
  value_BTNP = jnp.einsum('BTD,DNP->BTNP', x_BSD, layer['value_DNP'])

  B, S, H, P = query_BSHP.shape
  query_BSNRP = query_BSHP.reshape(B, S, config.kv_heads, -1, P)
  logits_BNRST = jnp.einsum('BSNRP,BTNP->BNRST', query_BSNRP, key_BTNP) * P ** -0.5
  seen_ST = jnp.tril(jnp.ones((S, S), bool))
  weight_BNRST = jax.nn.softmax(jnp.where(seen_ST, logits_BNRST, -jnp.inf))
  mixed_BSNRP = jnp.einsum('BNRST,BTNP->BSNRP', weight_BNRST, value_BTNP)
  return jnp.einsum('BSHP,HPD->BSD', mixed_BSNRP.reshape(B, S, H, P), layer['out_HPD'])


def mixture_of_experts(layer: Params, x_BSD, config: Config):
  """The weighted outputs of each token's K best experts, and the balance loss."""
  x_TD = x_BSD.reshape(-1, config.dim)

  # Route: the K largest logits choose the experts, and a softmax over them weighs their outputs.
  logits_TE = x_TD @ layer['router_DE']
  best_TK, expert_TK = jax.lax.top_k(logits_TE, config.experts_per_token)
  weight_TK = jax.nn.softmax(best_TK)

  # Dispatch: one row for each choice of each token, sorted by expert. None is dropped, however full an expert is.
  order_M = jnp.argsort(expert_TK.reshape(-1))
  token_M = order_M // config.experts_per_token
  rows_E = jnp.bincount(expert_TK.reshape(-1), length=config.experts)

  # Compute: the first rows_E[0] rows times the matrix of expert 0, the next rows_E[1] rows times that of expert 1, ...
  matmul = functools.partial(jax.lax.ragged_dot, group_sizes=rows_E)
  x_MD = x_TD[token_M]
  hidden_MF = jax.nn.silu(matmul(x_MD, layer['gate_EDF'])) * matmul(x_MD, layer['up_EDF'])
  y_MD = matmul(hidden_MF, layer['down_EFD'])

  # Combine: each token sums its rows, weighted.
  y_TD = jnp.zeros_like(x_TD).at[token_M].add(y_MD * weight_TK.reshape(-1)[order_M, None])

  # Balance: K if choices or probabilities are uniform, more if frequent choices are probable. Counts have no gradient.
  share_E = rows_E / len(x_TD)
  probability_E = jax.nn.softmax(logits_TE).mean(0)
  return y_TD.reshape(x_BSD.shape), config.experts * jnp.sum(share_E * probability_E)


def forward(params: Params, tokens_BS, config: Config):
  """The logits [B,S,V] of every next token, and the sum of the layers' balance losses."""
  x_BSD, balance = params['embedding_VD'][tokens_BS], 0.
  for layer in params['layers']:
    x_BSD += attention(layer, rms_norm(x_BSD, layer['attention_norm_D'], config), config)
    y_BSD, layer_balance = mixture_of_experts(layer, rms_norm(x_BSD, layer['experts_norm_D'], config), config)
    x_BSD, balance = x_BSD + y_BSD, balance + layer_balance
  return rms_norm(x_BSD, params['norm_D'], config) @ params['head_DV'], balance


def loss_fn(params: Params, text_BS, config: Config):
  """Every token but the first is predicted, from the tokens before it."""
  logits_BSV, balance = forward(params, text_BS[:, :-1], config)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, text_BS[:, 1:]).mean()
  return cross_entropy + config.balance * balance


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.), optax.adamw(3e-3))


@functools.partial(jax.jit, static_argnames='config', donate_argnames=('params', 'opt_state'))
def train_step(params: Params, opt_state: optax.OptState, text_BS, config: Config):
  loss, gradients = jax.value_and_grad(loss_fn)(params, text_BS, config)
  updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def main(steps: int = 60) -> list[float]:
  """Trains on one sentence, repeated; returns the loss of each step."""
  sentence = b'How much wood would a woodchuck chuck if a woodchuck could chuck wood? '
  text = jnp.array(list(2 * sentence))
  config, key = Config(), jax.random.key(0)
  params = init(config, key)
  opt_state, losses = OPTIMIZER.init(params), []
  for step in range(steps):
    starts = jax.random.randint(jax.random.fold_in(key, step), (8, 1), 0, len(sentence))
    params, opt_state, loss = train_step(params, opt_state, text[starts + jnp.arange(len(sentence))], config)
    losses.append(float(loss))
    if step % 10 == 0 or step == steps - 1:
      print(f'step {step:2d}  loss {loss:.3f}')
  return losses


if __name__ == '__main__':
  main()
