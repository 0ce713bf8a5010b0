"""The tables of docs/development.md, from the results files beside the tests."""
import json
from collections.abc import Callable
from typing import Any

from experiments import runner

TESTS = runner.ROOT / 'tests'


def times() -> str:
  """How long the tests take."""
  return _of('times.json', 'Not measured yet.', lambda runs: '\n'.join(
      ['| what | commit | passed | time | machine |', '|---|---|---|---|---|',
       *(f'| {run["what"]} | {run["commit"]} | {run["passed"]} | {_minutes(run["seconds"])} | {run["machine"]} |'
         for run in runs)]))


def mutants() -> str:
  """Which tests notice each planted fault."""
  def table(found):
    caught = sum(bool(row['caught_by']) for row in found.values())
    return '\n'.join([f'{caught} of {len(found)} are caught.', '', '| fault | in | first test that notices |',
                      '|---|---|---|',
                      *(f'| {name} | `{row["path"]}` | {_test(row["caught_by"])} |' for name, row in found.items())])
  return _of('mutants/results.json', 'Not tried yet: `python -m tests.mutants` does that.', table)


def fuzz() -> str:
  """Results of mutated configs."""
  def table(found):
    verdicts = found['verdicts']
    faults = sum(verdicts.values()) - verdicts.get('accepted', 0) - verdicts.get('refused', 0)
    trained = found['trained']
    lines = ['| mutants | accepted | refused | faults | trained for two steps, with an evaluation |',
             '|---|---|---|---|---|',
             f'| {found["mutants"]} | {verdicts.get("accepted", 0)} | {verdicts.get("refused", 0)} | {faults} | '
             f'{", ".join(f"{count} {verdict}" for verdict, count in sorted(trained.items())) or "none"} |']
    return '\n'.join(lines)
  return _of('fuzz/results.json', 'Not tried yet: `python -m tests.fuzz` does that.', table)


def _of(name: str, missing: str, table: Callable[[Any], str]) -> str:
  path = TESTS / name
  return table(json.loads(path.read_text())) if path.exists() else missing


def _test(caught):
  return f'`{caught[0].removeprefix("tests/")}`' if caught else '**none**'


def _minutes(seconds):
  return f'{seconds // 60:.0f} min {seconds % 60:.0f} s'
