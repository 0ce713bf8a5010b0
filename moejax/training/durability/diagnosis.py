"""Why the update of a step was refused: which value is not finite, and where it began, or which limit it exceeds."""
from typing import Any

import jax
import numpy as np


def explain(metrics: dict[str, Any], batch: dict[str, Any]) -> str:
  """A sentence on the loss, the gradient and the update of a step: where they are not finite, or what they exceed."""
  if 'train/loss' not in metrics:
    return 'the run had stopped here.'
  metrics = jax.device_get(metrics)
  loss, norm = float(metrics['train/loss']), float(metrics['train/grad_norm'])
  if np.isfinite(loss) and np.isfinite(norm) and not np.isfinite(metrics['train/learning_rate']):
    rate = metrics['train/learning_rate']
    return f'Loss {loss:.4g} and gradient norm {norm:.4g} are finite; the learning rate is {rate}.'
  if np.isfinite(loss) and np.isfinite(norm) and metrics['recovery/not_finite']:
    return (f'Loss {loss:.4g} and gradient norm {norm:.4g} are finite; the update is not: it leaves NaN or infinity in '
            f'parameters, optimizer or router state (arrays: {metrics["recovery/not_finite"]}; learning rate '
            f'{float(metrics["train/learning_rate"]):.4g}).')
  if np.isfinite(loss) and np.isfinite(norm):
    return (f'Loss {loss:.4g}, gradient norm {norm:.4g}: a spike, above {float(metrics["recovery/loss_limit"]):.4g} or '
            f'{float(metrics["recovery/gradient_norm_limit"]):.4g}.')
  return f'Loss {loss}, gradient norm {norm}. {first_not_finite(metrics, batch)}'


def first_not_finite(metrics: dict[str, Any], batch: dict[str, Any]) -> str:
  """Where values first stop being finite, in the order of computation: batch, routers by depth, then gradients.

  One bad layer spoils all layers above it on the way up, and all below it on the way down; so of the routers the first
  is named, and gradients (by module) only where the forward pass was sound.
  """
  for name, values in batch.items():
    if np.issubdtype(np.asarray(values).dtype, np.floating) and not np.isfinite(values).all():
      rows = np.flatnonzero(~np.isfinite(np.asarray(values)).reshape(len(values), -1).all(-1))
      return f'The batch itself is not finite: {name!r}, examples {rows[:8].tolist()}.'
  for name in sorted(metrics):
    if name.startswith('router/') and not np.isfinite(metrics[name]).all():
      _, layer, metric = name.split('/', 2)
      return f'First layer that is not finite: {layer} (its router\'s {metric}).'
  gradients = {name.removeprefix('gradient_norm/'): np.isfinite(norm)
               for name, norm in metrics.items() if name.startswith('gradient_norm/')}
  bad = sorted(module for module, finite in gradients.items() if not finite)
  if bad and len(bad) < len(gradients):
    return (f'Every router is finite; gradients are not finite in {len(bad)} of {len(gradients)} modules: '
            f'{", ".join(bad[:6])}{", ..." if len(bad) > 6 else ""}.')
  if bad:
    return 'Every router is finite, but the gradient of every module is not: check what follows the last router.'
  if not np.isfinite(metrics['train/grad_norm']):
    return 'Every single gradient is finite, but their norm overflows.'
  parts = [name for name in sorted(metrics)
           if name.startswith('train/') and name != 'train/loss' and not np.isfinite(metrics[name]).all()]
  named = f': {", ".join(parts)}' if parts else ''
  return f'Every router and every gradient is finite; only the loss is not{named}.'
