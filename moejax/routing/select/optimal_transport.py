"""Optimal transport plans between tokens and experts with prescribed marginals.

    sinkhorn    entropic regularisation, solved by scaling rows and columns            S-BASE; KL baseline of sparse OT
    sparse      quadratic regularisation, at most k tokens per expert or vice versa    sparsity-constrained OT
    bounded     entropic, with an upper bound on every entry                           capped Expert Choice

All work on one group, in float32, and without gradients: plans select but do not weigh.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32
import optax

# A finite stand-in for log 0, so that differences of two are not NaN.
_LOG_ZERO = -1e30


def _log(mass: jax.Array) -> jax.Array:
  return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.)), _LOG_ZERO)


def sinkhorn(scores: Float32[Array, 'S E'], of_tokens: Float32[Array, 'S'], of_experts: Float32[Array, 'E'],
             epsilon: float, iterations: int) -> Float32[Array, 'S E']:
  """`argmax_P <P, scores> + epsilon * H(P)` over plans with these marginals (Cuturi 2013), in the log domain.

  Args:
    scores: <float32>[S,E].
    of_tokens: <float32>[S] mass of every token; 0 for padding.
    of_experts: <float32>[E] mass of every expert; the same total.
    epsilon: weight of the entropy; as it approaches 0 the plan becomes an assignment and needs more iterations.
    iterations: number of scalings of the columns, each followed by one of the rows.

  Returns:
    <float32>[S,E]; rows always sum to `of_tokens`, columns to `of_experts` at convergence.
  """
  scores, log_tokens, log_experts = scores / epsilon, _log(of_tokens)[:, None], _log(of_experts)

  def scale(_, potentials):
    token, _ = potentials
    expert = log_experts - jax.nn.logsumexp(scores + token, axis=0)
    return log_tokens - jax.nn.logsumexp(scores + expert, axis=1, keepdims=True), expert

  start = (jnp.where(of_tokens > 0, 0., _LOG_ZERO)[:, None], jnp.zeros_like(of_experts))
  token, expert = jax.lax.fori_loop(0, iterations, scale, start)
  return jnp.exp(scores + token + expert)


def project_to_sparse_simplex(x: Float32[Array, 'S E'], k: int) -> Float32[Array, 'S E']:
  """Projects each column of `x` onto the points of the simplex with at most `k` non-zeros.

  Projecting the k largest entries onto the simplex is exact although the set is not convex (Kyrillidis et al. 2013).

  Args:
    x: <float32>[S,E]; rows of -inf get zeros.
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


def sparse(scores: Float32[Array, 'R L'], of_rows: Float32[Array, 'R'], of_columns: Float32[Array, 'L'], k: int,
           gamma: float = 1., iterations: int = 20, learning_rate: float = 1e-2) -> Float32[Array, 'R L']:
  """`argmax_P <P, scores> - gamma/2 |P|^2` over plans with these marginals and at most `k` non-zeros per column.

  Sparsity-constrained optimal transport (arXiv 2209.15466, section 4): Adam maximises the semi-dual over one potential
  per row, from zero, as in google-research/vmoe. With `k` the number of rows it is quadratic optimal transport
  (Blondel et al. 2018). Columns sum to `of_columns`, and have at most k non-zeros, after any number of iterations;
  rows sum to `of_rows` only at convergence, and not even then if k is too small for any feasible plan.

  Args:
    scores: <float32>[R,L]: rows are tokens to limit the tokens per expert, or experts to limit the experts per token.
    of_rows: <float32>[R]; rows of mass 0 are ignored.
    of_columns: <float32>[L], the same total.
    k: at most R.
    gamma: weight of the quadratic term.
    iterations: number of Adam steps.
    learning_rate: for Adam.

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


def bounded(scores: Float32[Array, 'R L'], of_rows: Float32[Array, 'R'], of_columns: Float32[Array, 'L'],
            upper: Float32[Array, 'R L'], epsilon: float, iterations: int) -> Float32[Array, 'R L']:
  """`argmax_P <P, scores> + epsilon * (H(P) + H(upper - P))` over plans with these marginals and `0 <= P <= upper`.

  The bound is a third marginal: `upper - P` is a second plan with scores zero, and Sinkhorn scales rows, columns and
  this depth in turn, while epsilon falls from 1 to its value on the schedule of lingvo's `max_assignment`.

  Args:
    scores: <float32>[R,L].
    of_rows: <float32>[R].
    of_columns: <float32>[L], the same total.
    upper: <float32>[R,L].
    epsilon: weight of the entropy, at most 1.
    iterations: number of rounds of the three scalings.

  Returns:
    <float32>[R,L]; always at most `upper`, with the prescribed marginals at convergence.
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
