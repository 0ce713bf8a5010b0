"""Sparse transport against `jaxopt`, with whose semi-dual solver google-research/vmoe routes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.routing.select import optimal_transport

pytestmark = pytest.mark.oracle

S, E = 24, 4


def jaxopt_plan(scores, of_rows, of_columns, k, gamma, iterations):
  """With the regularised maximum over at most k entries that the paper defines, and its gradient."""
  import jaxopt
  from jaxopt._src import projection

  def maximum(x, mass, gamma):
    scale = gamma * mass
    point = jax.lax.stop_gradient(jaxopt.projection.projection_sparse_simplex(x / scale, k))
    return point @ x - scale / 2 * point @ point

  def by_column(f):
    return jax.vmap(f, in_axes=(1, 0, None))

  solver = functools.partial(jaxopt.OptaxSolver, maxiter=iterations, opt=optax.adam(1e-2), tol=0.)
  return projection._regularized_transport_semi_dual(
      cost_matrix=-scores, marginals_a=of_rows, marginals_b=of_columns, make_solver=solver,
      max_vmap=by_column(maximum), max_grad_vmap=by_column(jax.grad(maximum)), gamma=gamma)


@pytest.mark.parametrize('side', ['experts', 'tokens'])
@pytest.mark.parametrize('k, gamma, iterations', [(1, 1., 20), (4, 1., 20), (3, 0.1, 100)])
def test_plans_are_those_of_jaxopt(side, k, gamma, iterations):
  scores = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).normal(size=(S, E)), jnp.float32))
  problem = scores, jnp.ones(S), jnp.full(E, S / E)
  if side == 'tokens':
    problem = scores.T, problem[2], problem[1]
  ours = optimal_transport.sparse(*problem, k, gamma, iterations)
  # Adam divides by the root of a mean of squares, which makes the most of what float32 sums differ by.
  np.testing.assert_allclose(ours, jaxopt_plan(*problem, k, gamma, iterations), atol=1e-5)


def test_without_a_limit_they_are_those_of_jaxopt_s_projection_onto_the_transport_polytope():
  import jaxopt
  scores = jnp.asarray(np.random.default_rng(1).normal(size=(S, E)), jnp.float32)
  sums = jnp.ones(S), jnp.full(E, S / E)
  theirs = jaxopt.projection.projection_transport(scores, sums)
  np.testing.assert_allclose(optimal_transport.sparse(scores, *sums, S, 1., 3000), theirs, atol=2e-3)
