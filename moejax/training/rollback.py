"""What the host does about skipped batches: says so, rolls back, and ends the run when that does not help.

It rolls back when there are too many in a row, or an update has left a state that is not finite.

A rollback takes parameters, optimizer, router state and the memory of spikes from a checkpoint. It does not turn back
the step or the data: a batch, a random key and a learning rate belong to one step and are used at most once. So the run
moves past the data that it diverged on, and what it does depends on its state and its regular checkpoints alone.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.training import optimizer, recovery
from moejax.training.checkpoint import Checkpoints
from moejax.training.spikes import RecoveryConfig
from moejax.training.step import TrainState

# Of the train state's `skips`, what survives a rollback.
_COUNTERS = ('skipped', 'rollbacks', 'lost', 'rolled_back_at', 'rolled_back_to')


class Guard:
  """Looks at every step while the devices work on the next one.

  Args:
    options: config.recovery.
    state: that the run starts from.
    states: the same as `jax.ShapeDtypeStruct`s with their shardings.
    checkpoints: to roll back to.
    say: receives sentences for the person who runs this.
  """

  def __init__(self, options: RecoveryConfig, state: TrainState, states: TrainState, checkpoints: Checkpoints,
               say: Callable[[str], None]):
    self._options, self._states, self._checkpoints, self._say = options, states, checkpoints, say
    # A run that stopped between a step and the look at it looks when it resumes.
    skips = jax.device_get(state.skips)
    self._unseen: tuple[int, Any, Any] = int(state.step), _nothing(skips['in_a_row']), {}

  def after(self, now: int, metrics: dict[str, Any], batch: dict[str, Any], state: TrainState) -> TrainState:
    """Looks at the step before `now`; `state` is that after step `now`. Returns it, or what it is rolled back to.

    Always one step late, whatever else happens at a step: the same run rolls back at the same steps, however often it
    is stopped.

    Raises:
      recovery.Diverged: all rollbacks are used up, or there is nothing to roll back to.
    """
    seen, self._unseen = self._unseen, (now, metrics, batch)
    in_a_row = self._look(seen)
    if in_a_row < self._options.patience and sound(seen[1]):
      return state
    state = self._rolled_back(now, in_a_row, seen, state)
    self._unseen = now, _nothing(), {}
    return state

  def finish(self) -> None:
    """Looks at the last step. Raises recovery.Diverged where it has left nothing to keep."""
    in_a_row = self._look(self._unseen)
    if not sound(self._unseen[1]):
      raise self._diverged(self._unseen, in_a_row, 'It was the last step.')

  def _look(self, seen):
    at, metrics, batch = seen
    if metrics['train/skipped']:
      self._say(f'Step {at}: batch skipped. {_why(metrics, batch)}')
    elif not sound(metrics):
      self._say(f'Step {at}: the update cannot be kept. {_why(metrics, batch)}')
    return int(metrics['recovery/in_a_row'])

  def _rolled_back(self, now, in_a_row, seen, state):
    skips = {name: int(state.skips[name]) for name in _COUNTERS}
    if skips['rollbacks'] >= self._options.max_rollbacks:
      raise self._diverged(seen, in_a_row, f'{skips["rollbacks"]} rollbacks did not help.')
    # The state after the last good step is the present one; and where nothing good came after the last rollback, the
    # checkpoint that it went to was not good either.
    last_good = now - 1 - in_a_row
    before = last_good if last_good > skips['rolled_back_at'] else min(last_good, skips['rolled_back_to'])
    found = self._checkpoints.before(before, self._states)
    if found is None:
      raise self._diverged(seen, in_a_row, 'There is no checkpoint from before to roll back to.')
    at, old = found
    reason = f'{in_a_row} batches in a row were skipped' if sound(seen[1]) else 'The state is not finite'
    self._say(f'{reason}: rolled back to the checkpoint of step {at}; '
              f'{now - at} steps are lost. Training continues with the data that follow.')
    skips |= dict(rollbacks=skips['rollbacks'] + 1, lost=skips['lost'] + now - at,
                  rolled_back_at=now, rolled_back_to=at)
    place = lambda x: jax.device_put(np.int32(x), state.step.sharding)
    counters = {name: place(value) for name, value in {**skips, 'in_a_row': 0}.items()}
    return dataclasses.replace(old, step=place(now), skips={**old.skips, **counters},
                               opt_state=optimizer.at_step(old.opt_state, place(now)))

  def _diverged(self, seen, in_a_row, what):
    at, metrics, batch = seen
    row = f'{in_a_row} batches in a row were skipped. ' if in_a_row > 1 else ''
    return recovery.Diverged(
        f'Step {at}: {_why(metrics, batch)} {"The update was not applied. " if sound(metrics) else ""}{row}{what} '
        f'{self._checkpoints.last_good()} '
        'Usual remedies: a smaller config.optimizer.schedule.peak, a longer warm-up, config.optimizer.clip=1.0, or a '
        'z loss on the router; start them in another workdir.')


def sound(metrics: dict[str, Any]) -> bool:
  """Whether the state that a step with these metrics left is one to continue from, and to save."""
  return bool(metrics['train/skipped']) or not metrics['recovery/not_finite']


def _nothing(in_a_row=0):
  return {'recovery/in_a_row': in_a_row, 'recovery/not_finite': 0, 'train/skipped': False}


def _why(metrics, batch):
  if 'train/loss' not in metrics:
    return 'the run had stopped here.'
  metrics = jax.device_get(metrics)
  loss, norm = float(metrics['train/loss']), float(metrics['train/grad_norm'])
  if np.isfinite(loss) and np.isfinite(norm) and not np.isfinite(metrics['train/learning_rate']):
    rate = metrics['train/learning_rate']
    return f'Loss {loss:.4g} and gradient norm {norm:.4g} are finite; the learning rate is {rate}.'
  if np.isfinite(loss) and np.isfinite(norm) and metrics['recovery/not_finite']:
    return (f'Loss {loss:.4g} and gradient norm {norm:.4g} are finite; the update is not: it leaves NaN or infinity in '
            f'{metrics["recovery/not_finite"]} arrays of parameters, optimizer or router state '
            f'(learning rate {float(metrics["train/learning_rate"]):.4g}).')
  if np.isfinite(loss) and np.isfinite(norm):
    return (f'Loss {loss:.4g}, gradient norm {norm:.4g}: a spike, above {float(metrics["recovery/loss_limit"]):.4g} or '
            f'{float(metrics["recovery/gradient_norm_limit"]):.4g}.')
  return f'Loss {loss}, gradient norm {norm}. {recovery.locate(metrics, batch)}'


def counters(state: TrainState) -> dict[str, int]:
  """Skipped batches, rollbacks and the steps lost by them, as metrics."""
  return {f'recovery/{name}': int(value) for name, value in jax.device_get(
      {name: state.skips[name] for name in ('skipped', 'rollbacks', 'lost')}).items()}
