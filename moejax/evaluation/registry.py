"""The names of evaluators, and how all those of a config are built and run."""
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import Registry
from moejax.functional import Tree

# (params, router_state) -> {metric: float}
Evaluator = Callable[[Tree, Tree], dict[str, float]]

EVALUATORS = Registry('evaluator')


def build(config: Mapping, where: str = 'config.evaluation.evaluators', **context: Any) -> dict[str, Evaluator]:
  """`{name: evaluator}` for `config = {name: dict(name='accuracy', ...)}`.

  `context` is `pipeline`, `apply` (of `functional.Functional`) and `mesh`. Nothing is read or compiled yet.

  Raises:
    ConfigError: an evaluator, a key or a split that does not exist, or batches the evaluator cannot measure.
  """
  return {name: EVALUATORS.build(one, f'{where}.{name}', **context) for name, one in config.items()}


def measure(evaluators: Mapping[str, Evaluator], params: Tree, router_state: Tree) -> dict[str, float]:
  """Runs every evaluator: `{'test/accuracy': 0.97, ...}`."""
  return {f'{name}/{metric}': value
          for name, evaluator in evaluators.items() for metric, value in evaluator(params, router_state).items()}
