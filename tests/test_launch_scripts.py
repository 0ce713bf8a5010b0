"""The launch script of one machine, with a command in place of Python that ends as instructed."""
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'experiments/launch/host_port.sh'

# Acts for the process of its --process_id: `act_0`, `act_1`, ... of the environment.
PYTHON = '''#!/usr/bin/env bash
for argument; do [[ $argument == --process_id=* ]] && id=${argument#*=}; done
act=act_$id
eval "${!act}"
'''


def run(folder, *acts):
  (folder / 'python').write_text(PYTHON)
  (folder / 'python').chmod(0o755)
  environment = dict(os.environ, PATH=f'{folder}:{os.environ["PATH"]}', PORT='1234',
                     **{f'act_{number}': act for number, act in enumerate(acts)})
  return subprocess.run(['bash', SCRIPT, str(len(acts)), '--config=x'], env=environment, capture_output=True, text=True,
                        timeout=30)


@pytest.mark.parametrize('acts', [
    ('exit 0',), ('exit 0', 'exit 0'), ('sleep 0.5', 'exit 0', 'sleep 0.3'), ('sleep 0.1',) * 4])
def test_a_good_run_ends_without_a_message_of_the_shell(tmp_path, acts):
  ended = run(tmp_path, *acts)
  assert (ended.returncode, ended.stderr) == (0, '')


@pytest.mark.parametrize('acts, code', [
    (('exit 2', 'exec sleep 20'), 2), (('exec sleep 20', 'sleep 0.3; exit 3', 'exec sleep 20'), 3),
    (('kill -9 $$', 'exec sleep 20'), 137)])
def test_the_first_that_fails_gives_its_code_and_ends_the_others(tmp_path, acts, code):
  ended = run(tmp_path, *acts)
  assert ended.returncode == code and 'no such job' not in ended.stderr
