"""Tokens of several documents and tasks, and what a router makes of them."""
import ast
import functools

import jax
import jax.numpy as jnp

from moejax import functional
from moejax.routing import router
from moejax.routing.inputs import RouterInputs

G, S, D, E = 2, 10, 8, 4
X = jax.random.normal(jax.random.key(0), (G, S, D))
# As the models number them: by row, padding (the last two of the second row) with the lowest number of its row.
DOCUMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3], [12, 12, 13, 13, 13, 13, 13, 13, 11, 11]])
VALID = DOCUMENTS != 11
TASKS = jnp.array([[0, 0, 0, 2, 2, 2, 2, 2, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
INPUTS = RouterInputs(valid=VALID, documents=DOCUMENTS, tasks=TASKS)


def routed(fragment, key=0, train=True, state=None):
  """(output, initial state) of the router `fragment`."""
  apply, params, first = compiled_router(repr(fragment))
  return apply(params, first if state is None else state, X, INPUTS,
               key=jax.random.key(key) if train else None, train=train), first


@functools.cache
def compiled_router(fragment):
  made = functional.functionalize(
      lambda rngs: router.build(ast.literal_eval(fragment), 'config.router', dim=D, num_experts=E, rngs=rngs))
  return jax.jit(made.apply, static_argnames='train'), *made.init(jax.random.key(0))
