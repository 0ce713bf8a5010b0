"""Evaluates a checkpoint, and appends the results to evaluations.jsonl of its run.

    python -m moejax.evaluate --workdir=runs/vmoe_digits --step=best
    python -m moejax.evaluate --workdir=runs/vmoe_digits --config.model.moe.router.place.eval_capacity_factor=2.0
    python -m moejax.evaluate --workdir=runs/vmoe_digits --config.model.moe.router.select.k=1

The config comes from the checkpoint. Its keys can be changed as long as the parameters keep their shapes: another
capacity or number of experts per token is a second graph over the same parameters. From Python:
`moejax.evaluate.run('runs/vmoe_digits', {'model.moe.router.select.k': 1})`. Exit codes are those of moejax.train.
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
  import jax
  from moejax.evaluation import log
  from moejax.parallel import processes, rules
  from moejax.training import workdir as workdirs
  from moejax.training.checkpoint import restore_for_evaluation
  from moejax.training.setup import prepare
  workdir, overrides = workdirs.find(workdir), dict(overrides or {})
  say = say if jax.process_index() == 0 else (lambda text: None)
  config, step, params, router_state = restore_for_evaluation(workdir, find_step(workdir, step))
  setup = prepare(override(config, overrides))
  if not setup.evaluators:
    raise ConfigError('config.evaluation.evaluators is empty: there is nothing to measure. Name one, e.g. '
                      '--config.evaluation.evaluators.test.name=accuracy.')
  check_parameters(setup, params, router_state)
  params = processes.spread(params, rules.shardings(setup.mesh, setup.model.axes, params))
  router_state = processes.spread(router_state, rules.shardings(setup.mesh, setup.model.state_axes, router_state))

  say(f'Evaluating step {step} of {workdir}' + ''.join(f', {key}={value}' for key, value in overrides.items()) + '.')
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
    path = log.append(workdir, step, overrides, results)
    say(f'Measured {", ".join(setup.evaluators)} at step {step}; written to {path}.\n'
        f'Next: compare with another checkpoint (--step=best) or, for a sparse model, another capacity or number of '
        f'experts per token; {Path(workdir) / "report" / "index.html"} names the keys.')
  return results


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
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


def find_step(workdir: str | Path, step: int | str) -> int | None:
  """The checkpoint step that 'last' (None: the latest readable one), 'best' or an int names."""
  if step == 'last':
    return None
  if step != 'best':
    if not str(step).isdigit():
      raise ConfigError(f"--step must be an int, 'last' or 'best', not {step!r}.")
    return int(step)
  from moejax.training import kept
  from moejax.training import metrics as training_metrics
  from moejax.training import workdir as workdirs
  options = workdirs.load_config(workdir).checkpoint
  steps = kept.complete(workdir)
  scores = {row['step']: row[options.metric] for row in training_metrics.read(workdir)
            if row['step'] in steps and row.get(options.metric) is not None}
  if not scores:
    raise ConfigError(f'Cannot determine the best checkpoint of {workdir}: config.checkpoint.metric is '
                      f'{options.metric!r}, and no checkpoint has a value for it. Use --step=last or one of the steps: '
                      f'{", ".join(map(str, sorted(steps))) or "there are none"}.')
  return (max if options.mode == 'max' else min)(scores, key=scores.get)


def main() -> None:
  """The command."""
  flags = command_line.Parser('moejax.evaluate', __doc__, keys='config')
  flags.add_argument('--workdir', metavar='FOLDER', help='folder of the run')
  flags.add_argument('--step', metavar='STEP', default='last', help="step of the checkpoint: an int, 'last' or 'best'")
  flags.add_processes()
  given = flags.parse(needs=['workdir'])
  command_line.start_processes(given)
  run(given.workdir, given.overrides, given.step)


if __name__ == '__main__':
  command_line.in_one_sentence(main)
