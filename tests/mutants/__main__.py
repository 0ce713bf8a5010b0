"""Plants each fault of `planted.py` and says which tests notice it: `python -m tests.mutants`.

Every mutant is tried in a copy of the checkout: on the test file that should notice, on its room where that does not, and
on all tests where none of those fails.
"""
import argparse
import concurrent.futures
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.planted import MUTANTS, ROOT, Mutant

RESULTS = Path(__file__).parent / 'results.json'
EXAMPLES = """
examples:
  python -m tests.mutants                       all of them, an hour on two cores; writes tests/mutants/results.json
  python -m tests.mutants --only=slot --jobs=2  those with this word in their names
  python -m tests.mutants --list                their names and files
"""
# One failing test is enough, but a few say whether the fault is noticed where it is, or only far away.
ENOUGH = 3


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser('python -m tests.mutants', description=__doc__, epilog=EXAMPLES,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', help='a word in the names of the mutants to plant')
  parser.add_argument('--jobs', type=int, default=2, help='mutants at a time')
  parser.add_argument('--list', action='store_true', help='name them and stop')
  options = parser.parse_args()
  chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
  if options.list or not chosen:
    sys.exit('\n'.join(f'{mutant.name:<50} {mutant.path}' for mutant in chosen or MUTANTS))
  found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    for number, (mutant, row) in enumerate(zip(chosen, pool.map(caught_by, chosen)), 1):
      found[mutant.name] = row
      # Written as it grows, in the order of the list: what was measured stays when the command is stopped.
      ordered = {other.name: found[other.name] for other in MUTANTS if other.name in found}
      RESULTS.write_text(json.dumps(ordered, indent=1) + '\n')
      print(f'[{number}/{len(chosen)}] {mutant.name}: {", ".join(row["caught_by"][:1]) or "NOT CAUGHT"} '
            f'({row["seconds"]:.0f} s)', flush=True)
  missed = [mutant.name for mutant in chosen if not found[mutant.name]['caught_by']]
  print(f'{len(chosen) - len(missed)} of {len(chosen)} caught, written to {RESULTS.relative_to(ROOT)}.')
  sys.exit(f'Not caught: {"; ".join(missed)}. Write a test for each.' if missed else 0)


def caught_by(mutant: Mutant) -> dict:
  """The tests that fail with `mutant` planted, of the first of its `tests` where any does, or else of all."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / 'moejax'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'runs', '__pycache__'))
    (copy / mutant.path).write_text(mutant.planted(copy))
    for tests in (*mutant.tests.split(), 'tests'):
      if failed := failures(copy, tests):
        break
  return dict(path=mutant.path, caught_by=failed, seconds=round(time.monotonic() - start, 1))


def failures(folder: Path, tests: str) -> list[str]:
  """The first of `tests` that fail in the checkout `folder`; the test that each mutant can be planted is left out."""
  command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', f'--maxfail={ENOUGH}',
             '--ignore=tests/mutants', tests]
  run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  if run.returncode > 1:  # A usage error, or a conftest that does not import: nothing was tested.
    raise RuntimeError(f'{" ".join(command)} in {folder} ended with {run.returncode}:\n'
                       f'{run.stdout[-2000:]}{run.stderr[-2000:]}')
  # A test's parameters may hold any character: what pytest adds begins with the last " - ".
  return [re.sub(r' - .*', '', line.partition(' ')[2]) for line in run.stdout.splitlines()
          if line.startswith(('FAILED ', 'ERROR '))]


if __name__ == '__main__':
  main()
