"""Which gate finds the right experts, where experts are known and fixed, and the answer is a mixture of a few of them?

`python -m experiments.paper_effects.programs.support --variant=dselect_k --seed=0 --out=FOLDER` has 20 tasks of their
own, each a mixture of 2 of 16 fixed random functions with unequal weights, learned by Adam from 64 inputs; a gate that
sees only a constant has to find the mixture. It writes `recovered`, the share of tasks whose two experts are
the two that weigh most in the end, and `loss`, relative to the variance of the answers.
"""
import jax
import jax.numpy as jnp
import optax

from experiments.paper_effects.programs import command
from moejax import functional
from moejax.random import derive
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs

TASKS, EXPERTS, INPUTS, K, STEPS = 20, 16, 64, 2, 1000
GATES = dict(
    top_k=papers.top_k_dropless(k=K, balance=0.),
    dselect_k=papers.dselect_k(k=K, entropy=1e-3),
    comet=papers.comet(k=K, entropy=1e-3),
    comet_plus=papers.comet(k=K, entropy=1e-3, search_steps=STEPS // 5))


def learn(gate: str, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(whether the two experts are found, relative loss) of one task."""
  built = functional.functionalize(
      lambda rngs: router.build(GATES[gate], 'config.router', dim=1, num_experts=EXPERTS, rngs=rngs))
  functions = jax.random.normal(derive(key, 'experts'), (INPUTS, EXPERTS))
  support = jax.random.permutation(derive(key, 'support'), EXPERTS)[:K]
  target = functions[:, support] @ jnp.asarray([0.6, 0.4])
  constant = jnp.ones((1, 1, 1))

  def shares(params, state, train):
    out = built.apply(params, state, constant, RouterInputs(), key=derive(key, 'noise') if train else None, train=train)
    return out.plan.to_dense().weight[0, 0], out

  def loss(params, state):
    weight, out = shares(params, state, True)
    return jnp.mean((functions @ weight - target)**2) + sum(out.losses.values()), out.updates

  params, state = built.init(derive(key, 'init'))
  adam = optax.adam(1e-2)

  def step(carry, _):
    params, state, moments = carry
    gradient, updates = jax.grad(loss, has_aux=True)(params, state)
    updated, moments = adam.update(gradient, moments)
    return (optax.apply_updates(params, updated), functional.merge_updates(state, updates), moments), None

  (params, state, _), _ = jax.lax.scan(step, (params, state, adam.init(params)), None, length=STEPS)
  weight, _ = shares(params, state, False)
  found = jnp.sort(jax.lax.top_k(weight, K)[1]) == jnp.sort(support)
  return found.all(), jnp.mean((functions @ weight - target)**2) / target.var()


def measure(gate: str, seed: int) -> dict[str, float]:
  keys = jax.random.split(jax.random.key(seed), TASKS)
  found, losses = jax.jit(jax.vmap(lambda key: learn(gate, key)))(keys)
  return dict(step=STEPS, recovered=found.mean(), loss=losses.mean())


if __name__ == '__main__':
  command.main(measure, GATES)
