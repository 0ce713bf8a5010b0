"""Training methods: how an objective is computed from passes of the model. One of them is `config.method`.

A method is called with `forward(key, batch) -> ModelOutput`, one pass in training mode of the current parameters, and
returns the objective of the step; the losses of the routers are those of the output that it returns.
"""
from collections.abc import Callable

import jax

from moejax.config import Registry
from moejax.models.output import ModelOutput
from moejax.training.objectives import Batch, Metrics, Objective

METHODS = Registry('training method')

Forward = Callable[[jax.Array, Batch], ModelOutput]


@METHODS('plain')
class Plain:
  """One pass, and the objective of its output."""

  def __call__(self, forward: Forward, objective: Objective, batch: Batch,
               key: jax.Array) -> tuple[jax.Array, Metrics, ModelOutput]:
    """(objective, its metrics, the output whose router losses and updates count)."""
    output = forward(key, batch)
    return *objective(output, batch), output
