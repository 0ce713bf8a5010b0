"""The training loop: initialise or restore, iterate, log, evaluate, checkpoint, finish. The only one there is."""
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from moejax import buckets, evaluation, streams
from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.parallel import processes
from moejax.training import device_memory, loggers, metrics, profile, progress, spanning_groups, step, workdir
from moejax.training.durability import checkpoint, lock, lost_process, retention, rollback, stop_reasons
from moejax.training.durability.batch_reader import BatchReader, NoBatch
from moejax.training.durability.collapse import CollapseAlarm
from moejax.training.durability.staging import StagingFolder
from moejax.training.setup import Setup, prepare

# Writes a report of (folder, setup, parameters, router state) into a staging folder, and returns its path.
WriteReport = Callable[[Path, Setup, Tree, Tree, Path], Path]


def run(config: Any, folder: str | Path, say: Callable[[str], None] = print,
        write_report: WriteReport | None = None) -> dict[str, Any]:
  """Trains `config` in `folder`, from the last checkpoint there, to the end; returns the metrics of the last step.

  Args:
    config: of the run.
    folder: of the run; created if missing.
    say: receives messages for the user.
    write_report: called at the end by all processes, if config.report asks for a report.

  Raises:
    ConfigError: before anything is compiled or written.
    stop_reasons.Stopped: the run stopped early, for a reason that the message explains.
  """
  streams.outlive_readers()
  say = processes.by_the_first(say)
  folder = workdir.find(folder)
  setup = prepare(config)
  device_memory.check(setup)
  if not retention.complete(folder):
    setup.init.check(setup)
  if jax.process_index() == 0:
    loggers.check(setup.loggers)
  for line in progress.describe(setup):
    say(line)
  with lock.held(folder, say), StagingFolder(folder, say) as staging:
    for change in workdir.claim(folder, setup.config):
      say(change)
    if slow := spanning_groups.notice(setup):
      say(slow)
    return train(setup, folder, say, write_report, staging)


def train(setup: Setup, folder: str | Path, say: Callable[[str], None] = print,
          write_report: WriteReport | None = None, staging: StagingFolder | None = None) -> dict[str, Any]:
  """The loop itself; `folder` belongs to the run of `setup`, and `staging` the files that grow."""
  total, staging = setup.training.steps, staging or StagingFolder(Path(folder), say)
  data, signal_in_any = setup.pipeline.fingerprint(), processes.LargestBefore()
  with (stop_reasons.Interruption() as interruption,
        checkpoint.Checkpoints(folder, setup.config, setup.checkpoint, say, data) as checkpoints,
        BatchReader(setup.pipeline.train(setup.seed, setup.rows), setup.recovery, interruption, say) as batches,
        lost_process.noticed()):
    states = step.abstract_state(setup)
    state = checkpoints.restore(states, batches)
    if state is None:
      state = setup.init.state(setup, buckets.path(folder), say)
    start = int(state.step)
    if start:
      say(f'Resuming after step {start} of {total}.')
    # Where there are several processes, all compile before any waits for the others; one compiles in its first step.
    compiles_ahead = jax.process_count() > 1
    with _compiling(compiles_ahead, say):
      train_step = processes.compiled(step.make_train_step(setup), state, setup.pipeline.batch_spec())

    with (metrics.MetricsWriter(staging.folder, start, staging.say, setup.loggers, setup.config.to_dict()) as writer,
          progress.Progress(setup, start, say) as shown,
          profile.Profile(setup.profile, staging.folder, start, shown) as trace):
      row, batches.say = writer.last_row, shown.say
      guard = rollback.Guard(setup.recovery, state, states, checkpoints, shown.say)
      collapse = CollapseAlarm(setup, writer.kept)
      for now in range(start + 1, total + 1):
        try:
          batch = batches.next(now)
        except NoBatch as failure:
          # Several processes can only save together.
          if now - 1 > start and jax.process_count() == 1 and staging.upload(now - 1):
            checkpoints.save(state, batches, {})
          _end_without_batch(failure, now - 1, total, checkpoints, interruption, shown.say)
        with _compiling(now == start + 1 and not compiles_ahead, shown.say), trace.step(now, state):
          state, measured = train_step(state, setup.place(batch))
        shown.advance()
        trace.after(now, state)
        state = guard.after(now, measured, batch, state)
        shown.completed(now - 1)  # The guard has checked it.

        signal = signal_in_any(interruption.signal or 0)
        stops = signal > 0
        logs = _due(now, setup.training.log_every, total)
        evaluates = bool(setup.evaluators) and _due(now, setup.evaluation.every, total)
        saves = _due(now, setup.checkpoint.every, total) or stops
        row = {}
        if logs or evaluates or saves:
          jax.block_until_ready(measured)
          shown.completed(now)
        if logs:
          row |= metrics.fetch(measured) | rollback.counters(state) | shown.measured()
          row |= collapse.look(now, row, shown.say)
          shown.show(now, row)
        with shown.paused():
          if evaluates:
            row |= _evaluate(setup, state, shown.say)
          if row:
            writer.write(now, row)
          if saves and rollback.sound(measured):
            writer.sync()  # A run resumes from this checkpoint with all rows up to it.
            if staging.upload(now):
              checkpoints.save(state, batches, row)
        if stops and now < total:
          _end_interrupted(now, total, checkpoints, signal)
      guard.finish()

    checkpoints.wait()
    if checkpoints.latest_step() != total:
      raise stop_reasons.NoCheckpoint(f'The checkpoint of the last step is missing. {checkpoints.last_good()} Free '
                                      'disk space, and run the same command again.')
  _finish(setup, buckets.path(folder), staging, state, row, writer.where(), say, write_report)
  return row


def _compiling(begins: bool, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
  return progress.announced('Compiling the training step', say) if begins else contextlib.nullcontext()


def _end_interrupted(now: int, total: int, checkpoints: checkpoint.Checkpoints, signal: int) -> NoReturn:
  checkpoints.wait()
  raise stop_reasons.Interrupted(f'Stopped after step {now} of {total}. {checkpoints.last_good()} '
                                 'The same command resumes from there.', signal)


def _end_without_batch(failure: NoBatch, now: int, total: int, checkpoints: checkpoint.Checkpoints,
                       interruption: stop_reasons.Interruption, say: Callable[[str], None]) -> NoReturn:
  if interruption.signal is not None:
    _end_interrupted(now, total, checkpoints, interruption.signal)
  ended = f'Stopped after step {now} of {total}: {failure}. {checkpoints.last_good()} The same command tries again.'
  if failure.__cause__ is None:
    raise stop_reasons.NoData(ended)
  say(ended)
  raise failure.__cause__


def _due(now: int, every: int | None, total: int) -> bool:
  return now == total or (every is not None and now % every == 0)


def _evaluate(setup: Setup, state: step.TrainState, say: Callable[[str], None]) -> dict[str, float]:
  measured = evaluation.measure(setup.evaluators, state.evaluated, state.router_state)
  row = {f'eval/{name}': value for name, value in measured.items()}
  if setup.checkpoint.metric is not None and setup.checkpoint.metric not in row:
    raise ConfigError(f'config.checkpoint.metric: {setup.checkpoint.metric!r} was not measured; '
                      f'measured were {", ".join(sorted(row))}.')
  say('  '.join(f'{name} {value:.4g}' for name, value in row.items() if '/router/' not in name))
  return row


def _finish(setup: Setup, folder: Path, staging: StagingFolder, state: step.TrainState, row: dict[str, Any],
            curves: list[str], say: Callable[[str], None], write_report: WriteReport | None) -> None:
  results = {name: value for name, value in row.items() if name.startswith('eval/') and '/router/' not in name}
  say(f'Finished: {setup.training.steps} steps.')
  trouble = rollback.counters(state)
  if trouble['recovery/skipped']:
    say('Skipped batches: {recovery/skipped}; rollbacks: {recovery/rollbacks}, which lost {recovery/lost} steps.'
        .format(**trouble))
  for name, value in results.items():
    say(f'  {name:<32} {value:.5g}')
  say(f'Checkpoint     {folder / "checkpoints" / str(setup.training.steps)}')
  if write_report is not None and setup.report.at == 'end':
    staging.say(f'Report         {write_report(folder, setup, state.evaluated, state.router_state, staging.folder)}')
  staging.say(f'Curves         {", or: ".join(curves)}')
  if trace := profile.where(staging.folder):
    staging.say(f'Profile        {trace}')
  say(f'Evaluate again python -m moejax.evaluate --workdir={folder}')
  say('Next           change one key with --config.<key>=<value> and another --workdir, and compare the two reports.')
