"""What the host does about skipped batches: reports them, rolls back after too many in a row or a state that is not
finite, and stops the run when rollbacks do not help.

A rollback restores parameters, optimizer state, router state and the spike statistics from a checkpoint. It rewinds
neither the step nor the data: a batch, a random key and a learning rate belong to one step and are used at most once.
So the run moves past the data that it diverged on, and depends only on its state and its regular checkpoints.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.training import optimizer_state
from moejax.training.durability import diagnosis, stop_reasons
from moejax.training.durability.checkpoint import Checkpoints
from moejax.training.durability.recovery import RecoveryConfig
from moejax.training.step import TrainState

# Entries of the train state's `skips` that survive a rollback.
_COUNTERS = ('skipped', 'rollbacks', 'lost', 'rolled_back_at', 'rolled_back_to')


class Guard:
  """Checks every step while the devices work on the next one.

  Args:
    options: config.recovery.
    state: with which the run starts or resumes.
    states: the same as `jax.ShapeDtypeStruct`s with their shardings.
    checkpoints: to roll back to.
    say: receives messages for the user.
  """

  def __init__(self, options: RecoveryConfig, state: TrainState, states: TrainState, checkpoints: Checkpoints,
               say: Callable[[str], None]):
    self._options, self._states, self._checkpoints, self._say = options, states, checkpoints, say
    # A run that stopped before it checked its last step does so when it resumes.
    skips = jax.device_get(state.skips)
    self._unseen: tuple[int, Any, Any] = int(state.step), _nothing(skips['in_a_row']), {}

  def after(self, now: int, metrics: dict[str, Any], batch: dict[str, Any], state: TrainState) -> TrainState:
    """Checks the step before `now`; returns `state`, the one after step `now`, or the state rolled back to.

    Always one step late, whatever else happens at a step: the same run rolls back at the same steps, however often it
    is stopped.

    Raises:
      stop_reasons.Diverged: all rollbacks are used up, or there is nothing to roll back to.
    """
    seen, self._unseen = self._unseen, (now, metrics, batch)
    in_a_row = self._look(seen)
    if in_a_row < self._options.patience and sound(seen[1]):
      return state
    state = self._rolled_back(now, in_a_row, seen, state)
    self._unseen = now, _nothing(), {}
    return state

  def finish(self) -> None:
    """Checks the last step. Raises stop_reasons.Diverged where its state is not finite."""
    in_a_row = self._look(self._unseen)
    if not sound(self._unseen[1]):
      raise self._diverged(self._unseen, in_a_row, 'It was the last step.')

  def _look(self, seen):
    at, metrics, batch = seen
    if metrics['train/skipped']:
      self._say(f'Step {at}: batch skipped. {diagnosis.explain(metrics, batch)}')
    elif not sound(metrics):
      self._say(f'Step {at}: the update cannot be kept. {diagnosis.explain(metrics, batch)}')
    return int(metrics['recovery/in_a_row'])

  def _rolled_back(self, now, in_a_row, seen, state):
    skips = {name: int(state.skips[name]) for name in _COUNTERS}
    if skips['rollbacks'] >= self._options.max_rollbacks:
      raise self._diverged(seen, in_a_row,
                           f'No rollback is left (config.recovery.max_rollbacks={self._options.max_rollbacks}).')
    # Skipped batches keep the state of the last good step, so that one is bad too; and if no step was good after the
    # last rollback, so is the checkpoint that it restored.
    last_good = now - 1 - in_a_row
    before = last_good if last_good > skips['rolled_back_at'] else min(last_good, skips['rolled_back_to'])
    found = self._checkpoints.before(before, self._states)
    if found is None:
      raise self._diverged(seen, in_a_row, 'There is no earlier checkpoint to roll back to.')
    at, old = found
    reason = f'Batches skipped in a row: {in_a_row}' if sound(seen[1]) else 'The state is not finite'
    self._say(f'{reason}. Rolled back to the checkpoint of step {at}; steps lost: {now - at}. Training continues with '
              'the next batch.')
    skips |= dict(rollbacks=skips['rollbacks'] + 1, lost=skips['lost'] + now - at,
                  rolled_back_at=now, rolled_back_to=at)
    place = lambda x: jax.device_put(np.int32(x), state.step.sharding)
    counters = {name: place(value) for name, value in {**skips, 'in_a_row': 0}.items()}
    return dataclasses.replace(old, step=place(now), skips={**old.skips, **counters},
                               opt_state=optimizer_state.at_step(old.opt_state, place(now)))

  def _diverged(self, seen, in_a_row, what):
    at, metrics, batch = seen
    row = f'{in_a_row} batches in a row were skipped. ' if in_a_row > 1 else ''
    return stop_reasons.Diverged(
        f'Step {at}: {diagnosis.explain(metrics, batch)} '
        f'{"The update was not applied. " if sound(metrics) else ""}{row}{what} {self._checkpoints.last_good()} '
        'Usual remedies: a smaller config.optimizer.schedule.peak, a longer warm-up, config.optimizer.clip=1.0, or a '
        'z loss on the router; start a new run with them in another --workdir.')


def sound(metrics: dict[str, Any]) -> bool:
  """Whether the state after a step with these metrics can be continued from, and saved."""
  return bool(metrics['train/skipped']) or not metrics['recovery/not_finite']


def _nothing(in_a_row=0):
  return {'recovery/in_a_row': in_a_row, 'recovery/not_finite': 0, 'train/skipped': False}


def counters(state: TrainState) -> dict[str, int]:
  """Skipped batches, rollbacks and the steps lost to them, as metrics."""
  return {f'recovery/{name}': int(value) for name, value in jax.device_get(
      {name: state.skips[name] for name in ('skipped', 'rollbacks', 'lost')}).items()}
