"""The base class of dispatchers: registry, check for unsupported plans, and the identity path."""
import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from moejax import experts as experts_lib
from moejax.config import ConfigError, Registry, at, config_path
from moejax.kernels import CannotRun
from moejax.parallel import rules
from moejax.routing.plans import Plan, TokenPlan


def build(config: Mapping, where: str) -> 'Dispatcher':
  """Builds the dispatcher named in `config`, e.g. `dict(name='gather')`. `where` is the config path."""
  return DISPATCHERS.build(config, where)


@dataclasses.dataclass(frozen=True)
class Dispatcher:
  """Executes plans. A subclass defines which (`supports`) and how (`run`).

  Attributes:
    where: its config path, for errors while it runs.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)

  @classmethod
  def supports(cls, plan_type: type[Plan], placed: bool) -> bool:
    """Whether it can run plans of this type; `placed`: whether they have a capacity (a TokenPlan may not)."""
    raise NotImplementedError

  def run(self, plan: Plan, x: Float[Array, 'G S D'], experts: experts_lib.BoundExperts) -> Float[Array, 'G S D']:
    """x: <float>[G,S,D] -> <float>[G,S,D], without the identity path."""
    raise NotImplementedError

  def run_on_mesh(self, plan: Plan, x: Float[Array, 'G S D'],
                  experts: experts_lib.BoundModule) -> Float[Array, 'G S D']:
    """`run` on the active mesh of several devices. By default the compiler partitions it."""
    return self.run(plan, x, experts)

  def __call__(self, plan: Plan, x: Float[Array, 'G S D'], experts: experts_lib.Expert, *, key: jax.Array | None = None,
               train: bool = False) -> Float[Array, 'G S D']:
    """The sum over experts of combine weight times expert output, plus `passthrough` times the token.

    Args:
      plan: for the G groups of S tokens of `x`.
      x: <float>[G,S,D].
      experts: called as `experts(rows, layout, key=key, train=train)`.
      key: for dropout in the experts.
      train: passed to the experts.

    Returns:
      <float>[G,S,D] of the dtype of `x`.

    Raises:
      ConfigError: while tracing, before compilation: the dispatcher does not support the plan, or its implementation
        cannot run here.
    """
    mesh = rules.active()
    run = self.run if mesh is None or mesh.size == 1 else self.run_on_mesh
    with at(self.where):
      self.check(plan)
      try:
        y = run(plan, x, experts_lib.BoundModule(experts, key, train))
      except CannotRun as limit:
        raise ConfigError(f'.implementation: {limit}') from None
    if plan.passthrough is not None:
      y = y + plan.passthrough[..., None] * x
    return y.astype(x.dtype)

  def check(self, plan: Plan) -> None:
    """Raises ConfigError, naming the dispatchers that can, if this one cannot run `plan`."""
    kind = type(plan), _placed(plan)
    if not self.supports(*kind):
      own = next(name for name in DISPATCHERS if DISPATCHERS[name] is type(self))
      able = [repr(name) for name in DISPATCHERS if DISPATCHERS[name].supports(*kind)]
      raise ConfigError(f': dispatcher {own!r} cannot run a {_describe(plan)}; {" and ".join(able)} can. '
                        'Change the dispatcher or the router.')


DISPATCHERS = Registry('dispatcher', Dispatcher)


def _placed(plan):
  return not isinstance(plan, TokenPlan) or plan.capacity is not None


def _describe(plan):
  capacity = (' with a capacity' if _placed(plan) else ' without a capacity') if isinstance(plan, TokenPlan) else ''
  return type(plan).__name__ + capacity
