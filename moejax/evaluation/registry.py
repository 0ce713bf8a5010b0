"""The registry of evaluators; builds and runs the evaluators of a config."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moejax.config import Registry
from moejax.evaluation.passes import MeshProgram
from moejax.functional import Tree


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """A measurement of a model.

  Attributes:
    measure: (params, router_state) -> {metric: float}.
    passes: its programs on the devices, of (params, router_state, batch), each with the `{name: jax.ShapeDtypeStruct}`
      of its batches.
  """
  measure: Callable[[Tree, Tree], dict[str, float]]
  passes: tuple[tuple[MeshProgram, dict[str, jax.ShapeDtypeStruct]], ...]

  def __call__(self, params: Tree, router_state: Tree) -> dict[str, float]:
    return self.measure(params, router_state)

  def trace(self, params: Tree, router_state: Tree) -> None:
    """Traces the model as `measure` does, to raise its errors; arguments are shapes, nothing is read or compiled."""
    for program, spec in self.passes:
      program.trace(params, router_state, spec)


EVALUATORS = Registry('evaluator', Evaluator, context=('pipeline', 'apply', 'mesh'))


def build(config: Mapping, where: str = 'config.evaluation.evaluators', *, batch_size: int | None = None,
          **context: Any) -> dict[str, Evaluator]:
  """`{name: evaluator}` for `config = {name: dict(name='accuracy', ...)}`.

  `context` is `pipeline`, `apply` (of `functional.Functional`) and `mesh`; `batch_size` is the default for evaluators
  whose config has none. Nothing is read or compiled yet.

  Raises:
    ConfigError: an evaluator, key or split does not exist, or an evaluator does not fit the batches.
  """
  def completed(one):
    return one if batch_size is None or one.get('batch_size') is not None else {**one, 'batch_size': batch_size}
  return {name: EVALUATORS.build(completed(one), f'{where}.{name}', **context) for name, one in config.items()}


def measure(evaluators: Mapping[str, Evaluator], params: Tree, router_state: Tree) -> dict[str, float]:
  """Runs every evaluator: `{'test/accuracy': 0.97, ...}`."""
  return {f'{name}/{metric}': value
          for name, evaluator in evaluators.items() for metric, value in evaluator(params, router_state).items()}
