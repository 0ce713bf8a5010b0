"""Optimal transport: how much of every token goes to every expert, when all shares are prescribed.

    sinkhorn    entropic regularisation, solved by scaling rows and columns            S-BASE; KL baseline of sparse OT
    sparse      quadratic regularisation, at most k tokens an expert or experts a token            sparsity-constrained OT
    bounded     entropic, with an upper bound on every entry                                       capped Expert Choice

All work on one group, in float32, and are used without gradient: plans select, they do not weigh.
"""
import jax
import jax.numpy as jnp
import optax

# Stands for the log of zero: finite, so that differences of it are numbers.
_LOG_ZERO = -1e30


def _log(mass: jax.Array) -> jax.Array:
  return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.)), _LOG_ZERO)


def sinkhorn(scores: jax.Array, of_tokens: jax.Array, of_experts: jax.Array, epsilon: float,
             iterations: int) -> jax.Array:
  """`argmax_P <P, scores> + epsilon * H(P)` over the plans with these sums (Cuturi 2013), in the log domain.

  Args:
    scores: <float32>[S,E].
    of_tokens: <float32>[S] what every token gives; 0 for padding.
    of_experts: <float32>[E] what every expert receives; the same in total.
    epsilon: weight of the entropy; towards 0 the plan becomes an assignment, and needs more iterations.
    iterations: scalings of the columns, each followed by one of the rows.

  Returns:
    <float32>[S,E]; rows sum to `of_tokens` always, columns to `of_experts` at convergence.
  """
  scores, log_tokens, log_experts = scores / epsilon, _log(of_tokens)[:, None], _log(of_experts)

  def scale(_, potentials):
    token, _ = potentials
    expert = log_experts - jax.nn.logsumexp(scores + token, axis=0)
    return log_tokens - jax.nn.logsumexp(scores + expert, axis=1, keepdims=True), expert

  start = (jnp.where(of_tokens > 0, 0., _LOG_ZERO)[:, None], jnp.zeros_like(of_experts))
  token, expert = jax.lax.fori_loop(0, iterations, scale, start)
  return jnp.exp(scores + token + expert)


def project_to_sparse_simplex(x: jax.Array, k: int) -> jax.Array:
  """The nearest points to the columns of `x` on the simplex with at most `k` non-zeros each.

  The k largest entries, projected onto the simplex: exact, though the set is not convex (Kyrillidis et al. 2013).

  Args:
    x: <float32>[S,E]; rows of -inf get nothing.
    k: at most S.

  Returns:
    <float32>[S,E] whose columns sum to 1 where they have a finite entry, and to 0 elsewhere.
  """
  order = jnp.argsort(-x, axis=0, stable=True)[:k]
  largest = jnp.take_along_axis(x, order, axis=0)
  excess = (jnp.cumsum(largest, axis=0) - 1) / jnp.arange(1, k + 1)[:, None]
  support = jnp.sum(largest > excess, axis=0)
  threshold = jnp.take_along_axis(excess, jnp.maximum(support - 1, 0)[None], axis=0)
  share = jnp.where(largest > threshold, largest - threshold, 0.)
  return jnp.zeros_like(x).at[order, jnp.arange(x.shape[1])].set(share)


def sparse(scores: jax.Array, of_rows: jax.Array, of_columns: jax.Array, k: int, gamma: float = 1.,
           iterations: int = 20, learning_rate: float = 1e-2) -> jax.Array:
  """`argmax_P <P, scores> - gamma/2 |P|^2` over plans with these sums and at most `k` non-zeros a column.

  Sparsity-constrained optimal transport (arXiv 2209.15466, section 4) by its semi-dual over one potential a row, which
  Adam maximises from zero, as google-research/vmoe does. With `k` the number of rows it is quadratic optimal transport
  (Blondel et al. 2018). Columns sum to `of_columns`, and have at most k non-zeros, after any number of iterations;
  rows sum to `of_rows` only at convergence, and not even there if k is too small for any plan to do so.

  Args:
    scores: <float32>[R,L]: to limit the tokens of an expert, rows are tokens; to limit the experts of a token, experts.
    of_rows: <float32>[R]; a row of 0 takes no part.
    of_columns: <float32>[L], the same in total.
    k: at most R.
    gamma: weight of the quadratic term.
    iterations: steps of Adam.
    learning_rate: of Adam.

  Returns:
    <float32>[R,L].
  """
  scores = jnp.where(of_rows[:, None] > 0, scores, -jnp.inf)
  mass = jnp.where(of_columns > 0, of_columns, 1.)
  adam = optax.adam(learning_rate)

  def plan(potential):
    return of_columns * project_to_sparse_simplex((scores + potential[:, None]) / (gamma * mass), k)

  def step(_, state):
    potential, moments = state
    updates, moments = adam.update(plan(potential).sum(1) - of_rows, moments)
    return potential + updates, moments

  start = jnp.zeros_like(of_rows)
  potential, _ = jax.lax.fori_loop(0, iterations, step, (start, adam.init(start)))
  return plan(potential)


def bounded(scores: jax.Array, of_rows: jax.Array, of_columns: jax.Array, upper: jax.Array, epsilon: float,
            iterations: int) -> jax.Array:
  """`argmax_P <P, scores> + epsilon * (H(P) + H(upper - P))` over plans with these sums and `0 <= P <= upper`.

  The bound is a third marginal: what an entry lacks to it goes to a second plan of scores zero, and Sinkhorn scales
  rows, columns and this depth in turn, while epsilon falls from 1 to its value as lingvo's `max_assignment` lets it.

  Args:
    scores: <float32>[R,L].
    of_rows: <float32>[R].
    of_columns: <float32>[L], the same in total.
    upper: <float32>[R,L].
    epsilon: weight of the entropy, at most 1.
    iterations: of the three scalings.

  Returns:
    <float32>[R,L]; at most `upper` always, with the prescribed sums at convergence.
  """
  def with_rest(values, rest):
    return jnp.stack([values, rest])

  scores = with_rest(scores, jnp.zeros_like(scores))
  rows = _log(with_rest(of_rows, upper.sum(1) - of_rows))[:, :, None]
  columns = _log(with_rest(of_columns, upper.sum(0) - of_columns))[:, None]
  depth = _log(upper)[None]

  def scale(log_mass, others, axis, temperature):
    reached = jax.nn.logsumexp((scores + others) / temperature, axis=axis, keepdims=True)
    return temperature * (log_mass - jnp.maximum(reached, _LOG_ZERO))

  def step(iteration, state):
    temperature, _, column, bound = state
    temperature = jnp.maximum(epsilon, temperature * jnp.minimum(0.6 * 1.04**iteration, 0.85))
    row = scale(rows, column + bound, 2, temperature)
    column = scale(columns, row + bound, 1, temperature)
    return temperature, row, column, scale(depth, row + column, 0, temperature)

  start = (jnp.float32(1), jnp.zeros_like(rows), jnp.zeros_like(columns), jnp.zeros_like(depth))
  temperature, row, column, bound = jax.lax.fori_loop(0, iterations, step, start)
  return jnp.exp((scores + row + column + bound) / temperature)[0]
