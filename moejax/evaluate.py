"""Evaluates a checkpoint, or each as a run writes it, and appends the results to evaluations.jsonl of the run.

    python -m moejax.evaluate --workdir=runs/vmoe_digits --step=best
    python -m moejax.evaluate --workdir=runs/vmoe_digits --config.model.moe.router.place.eval_capacity_factor=2.0
    python -m moejax.evaluate --workdir=runs/vmoe_digits --config.model.moe.router.select.k=1
    python -m moejax.evaluate --workdir=runs/vmoe_digits --follow --every=60

The config comes from the checkpoint. Its keys can be changed as long as the parameters keep their shapes: another
capacity or number of experts per token is a second graph over the same parameters. From Python:
`moejax.evaluate.run('runs/vmoe_digits', {'model.moe.router.select.k': 1})`.

--follow evaluates the checkpoints of a run while another process trains it, on the devices of this process. It waits
for each checkpoint, earliest first, and ends after the last step's. evaluations.jsonl records which were evaluated with
the same keys: the same command resumes with the others.

Exit codes are those of moejax.train.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from moejax import command_line, config_files
from moejax.config import ConfigError

if TYPE_CHECKING:
  from moejax.functional import Tree
  from moejax.training.setup import Setup

# The sections of the config that affect an evaluation.
MAY_CHANGE = ('model', 'data', 'evaluation', 'mesh')


def run(workdir: str | Path, overrides: Mapping[str, Any] | None = None, step: int | str = 'last',
        say: Callable[[str], None] = print) -> dict[str, float]:
  """Measures all evaluators of the config and appends the result to `<workdir>/evaluations.jsonl`.

  Args:
    workdir: of a run that has a checkpoint.
    overrides: `{path in the config: value}`, e.g. `{'model.moe.router.select.k': 1}`.
    step: of the checkpoint; 'last', or 'best' by config.checkpoint.metric.
    say: receives messages for the user.

  Returns:
    `{'<evaluator>/<metric>': value}`.

  Raises:
    ConfigError: before anything is compiled: an invalid folder, an unknown key, or a change that
      needs other parameters.
    NoCheckpoint: there is no checkpoint to evaluate.
  """
  from moejax.parallel import processes
  from moejax.training import workdir as workdir_lib
  from moejax.training.durability import restore
  workdir, say = workdir_lib.find(workdir), processes.by_the_first(say)
  measure = _Measure(workdir, overrides, say)
  results = measure(*restore.restore_for_evaluation(workdir, restore.find_step(workdir, step)))
  say(f'Next: compare with another checkpoint (--step=best) or, for a sparse model, another capacity or number of '
      f'experts per token; {workdir / "report" / "index.html"} names the keys.')
  return results


def follow(workdir: str | Path, overrides: Mapping[str, Any] | None = None, every: float = 30.,
           say: Callable[[str], None] = print) -> None:
  """Measures all evaluators on each checkpoint of a run as it appears, in order, and returns after its last step's.

  Skips steps for which `<workdir>/evaluations.jsonl` has a line with the same overrides.

  Args:
    workdir: of the run, which may be training, or not have started.
    overrides: as for `run`.
    every: seconds between two checks for a checkpoint.
    say: receives messages for the user.

  Raises:
    ConfigError: as for `run`, as soon as the run has started.
    NoCheckpoint: the one of the last step cannot be read.
    Interrupted: a signal stopped it.
  """
  from moejax.evaluation import log
  from moejax.parallel import processes
  from moejax.training import follow as follow_lib
  from moejax.training import workdir as workdir_lib
  from moejax.training.durability import lost_process
  from moejax.training.durability.restore import restore_for_evaluation
  from moejax.training.durability.stop_reasons import NoCheckpoint
  workdir, say = workdir_lib.find(workdir), processes.by_the_first(say)
  measure = _Measure(workdir, overrides, say)
  if (workdir / 'config.json').exists():
    measure.prepared(workdir_lib.load_config(workdir))  # a wrong key is refused now, not at the first checkpoint

  def evaluate(step):
    try:
      with processes.together('read the checkpoint'):
        restored = restore_for_evaluation(workdir, step)
    except RuntimeError as error:
      lost_process.check(error)
      raise NoCheckpoint(f'{error}.') from error
    measure(*restored)
  follow_lib.run(workdir, evaluate, log.steps(workdir, measure.overrides, say), every, say)
  say(f'All checkpoints of {workdir} up to its last step are evaluated; the results are in {workdir / log.FILE}.')


class _Measure:
  """Measures checkpoints of `workdir`, and logs the results; equal configs share the compiled programs."""

  def __init__(self, workdir: Path, overrides: Mapping[str, Any] | None, say: Callable[[str], None]):
    self.overrides = dict(overrides or {})
    self._workdir, self._say = workdir, say
    self._prepared: tuple[ConfigDict, Setup] | None = None

  def __call__(self, config: ConfigDict, step: int, params: Tree, router_state: Tree) -> dict[str, float]:
    import jax
    from moejax.evaluation import log
    from moejax.parallel import processes, rules
    say, setup = self._say, self.prepared(config)
    check_parameters(setup, params, router_state)
    params = processes.spread(params, rules.shardings(setup.mesh, setup.model.axes, params))
    router_state = processes.spread(router_state, rules.shardings(setup.mesh, setup.model.state_axes, router_state))

    changes = ''.join(f', {key}={value}' for key, value in self.overrides.items())
    say(f'Evaluating step {step} of {self._workdir}{changes}.')
    results = {}
    for number, (name, evaluator) in enumerate(setup.evaluators.items(), 1):
      say(f'[{number}/{len(setup.evaluators)}] {name} ...')
      start = time.monotonic()
      measured = evaluator(params, router_state)
      results |= {f'{name}/{metric}': value for metric, value in measured.items()}
      for metric, value in measured.items():
        say(f'  {metric:<34} {value:.5g}')
      say(f'  took {time.monotonic() - start:.1f} s')
    if jax.process_index() == 0:
      path = log.append(self._workdir, step, self.overrides, results)
      say(f'Measured {", ".join(setup.evaluators)} at step {step}; written to {path}.')
    return results

  def prepared(self, config: ConfigDict) -> Setup:
    """The setup that evaluates checkpoints of `config`. Raises ConfigError if the overrides do not fit it."""
    from moejax.training.setup import prepare
    if self._prepared is None or config != self._prepared[0]:
      self._prepared = config, prepare(override(config, self.overrides))
    setup = self._prepared[1]
    if not setup.evaluators:
      raise ConfigError('config.evaluation.evaluators is empty: there is nothing to measure. Name one, e.g. '
                        '--config.evaluation.evaluators.test.name=accuracy.')
    return setup


def override(config: Mapping | ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """A copy of `config` with the values at these paths. `prepare` checks whether they are valid.

  Raises:
    ConfigError: a section that evaluation does not use, or an override that `config_files.override` refuses.
  """
  for path in overrides:
    if not path.startswith(tuple(f'{section}.' for section in MAY_CHANGE)):
      raise ConfigError(f'config.{path} has no effect on an evaluation. Keys can be changed in '
                        f'{", ".join(f"config.{section}" for section in MAY_CHANGE)}.')
  return config_files.override(config, overrides)


def check_parameters(setup: Setup, params: Tree, router_state: Tree) -> None:
  """Raises ConfigError if the parameters of the model of `setup` differ from those of the checkpoint."""
  from moejax.functional import flatten
  for what, wanted, found in zip(('parameter', 'router state'), setup.model.shapes(), (params, router_state)):
    wanted, found = ({path: tuple(leaf.shape) for path, leaf in flatten(tree).items()} for tree in (wanted, found))
    for path in sorted(wanted.keys() | found.keys()):
      if wanted.get(path) != found.get(path):
        raise ConfigError(f'The {what} {path} is {found.get(path, "absent")} in the checkpoint and '
                          f'{wanted.get(path, "absent")} in the model of this config. An evaluation can only '
                          'change keys that keep all parameters, such as capacity, experts per token or dispatch.')


def main() -> None:
  """The command."""
  flags = command_line.Parser('moejax.evaluate', __doc__, keys='config')
  flags.add_argument('--workdir', metavar='FOLDER', help='folder of the run, or gs://bucket/folder')
  flags.add_argument('--step', metavar='STEP', help="step of the checkpoint: an int, 'last' (default) or 'best'")
  flags.add_argument('--follow', action='store_true', help='each checkpoint of the run as it appears, to the last')
  flags.add_argument('--every', metavar='SECONDS', type=float, help='seconds between checks of --follow; default 30')
  flags.add_processes()
  given = flags.parse(needs=['workdir'])
  if given.follow and given.step is not None:
    flags.error('--follow evaluates every checkpoint: leave out --step')
  if given.every is not None and not (given.follow and 0 < given.every < float('inf')):
    flags.error('--every is a number of seconds above 0, and needs --follow')
  command_line.start_processes(given)
  if given.follow:
    follow(given.workdir, given.overrides, given.every or 30.)
  else:
    run(given.workdir, given.overrides, given.step or 'last')


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
