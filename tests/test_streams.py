"""A program without readers runs on: they have gone, or were never there."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '''
import os, sys
from moejax import command_line

def main():
  for number in range(3000):
    print('a line', number, flush=number % 2 == 0)
    print('a complaint', number, file=sys.stderr)
  os.write(2, b'a library speaks')
  with open(sys.argv[1], 'w') as file:
    print('saved', file=file)

command_line.in_one_sentence(main)
'''


ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))


@pytest.mark.parametrize('redirection', [
    '| head -1', '2>&1 | head -1', '2>&1 >/dev/null | head -1', '>&-', '2>&-', '>&- 2>&-', '<&- >&- 2>&-'])
def test_output_that_nobody_reads_is_discarded(redirection, tmp_path):
  script = tmp_path / 'program.py'
  script.write_text(PROGRAM)
  ended = subprocess.run(['bash', '-c', f'{sys.executable} {script} {tmp_path}/saved {redirection}; '
                          'exit ${PIPESTATUS[0]}'], capture_output=True, text=True, timeout=60,
                         env=ENVIRONMENT)
  assert ended.returncode == 0, ended.stderr
  assert (tmp_path / 'saved').read_text() == 'saved\n'  # and nothing else: no library wrote into our file
  assert 'Traceback' not in ended.stderr and 'BrokenPipe' not in ended.stderr


def test_output_that_is_read_arrives_whole_and_in_order(tmp_path):
  script = tmp_path / 'program.py'
  script.write_text(PROGRAM)
  ended = subprocess.run([sys.executable, script, tmp_path / 'saved'], capture_output=True, text=True, timeout=60,
                         env=ENVIRONMENT)
  assert ended.stdout.splitlines() == [f'a line {number}' for number in range(3000)]
  assert ended.stderr.splitlines() == [*(f'a complaint {number}' for number in range(3000)), 'a library speaks']
  assert ended.returncode == 0


def test_streams_replaced_by_others_stay(capsys):
  from moejax import streams
  before = sys.stdout, sys.stderr
  streams.outlive_readers()
  assert (sys.stdout, sys.stderr) == before
