"""The Dockerfile, read without Docker: its instructions, what its context holds, and that it agrees with setup.py."""
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


def instructions():
  """[(instruction, the rest of it)] in order, without comments; lines that end in a backslash are joined."""
  text = re.sub(r'^\s*#.*\n', '', (ROOT / 'Dockerfile').read_text(), flags=re.MULTILINE)
  return [tuple(line.split(None, 1)) for line in text.replace('\\\n', ' ').splitlines() if line.strip()]


def the(instruction):
  found, = [rest for name, rest in instructions() if name == instruction]
  return found


@pytest.fixture
def context(tmp_path):
  """The folder that Docker copies from: .dockerignore leaves out everything but what it names with an exclamation mark."""
  everything, *patterns = [line for line in (ROOT / '.dockerignore').read_text().splitlines()
                           if line and not line.startswith('#')]
  assert everything == '*'
  wanted = [pattern[1:] for pattern in patterns if pattern.startswith('!')]
  assert set(patterns) == {f'!{name}' for name in wanted} | {'**/__pycache__'}
  for name in wanted:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    elif (ROOT / name).exists():
      shutil.copy(ROOT / name, tmp_path)
  return tmp_path


def test_every_line_is_an_instruction_and_the_first_says_from_what():
  names = [name for name, _ in instructions()]
  assert names[0] == 'FROM' and set(names) <= {'FROM', 'ARG', 'RUN', 'WORKDIR', 'COPY', 'ENV', 'USER', 'ENTRYPOINT', 'CMD'}


def test_what_it_copies_is_in_the_context_and_enough_to_install(context):
  for name, rest in instructions():
    if name == 'COPY':
      *sources, _ = rest.split()
      assert sources and all((context / source).exists() for source in sources)
  said = subprocess.run([sys.executable, 'setup.py', '--name'], cwd=context, capture_output=True, text=True)
  assert said.stdout.split() == ['moejax'], said.stderr
  assert (context / 'moejax/train.py').exists() and (context / 'configs/vmoe_digits.py').exists()


def test_it_installs_the_jax_that_setup_py_asks_for_with_the_plugin_that_is_asked_for(monkeypatch):
  asked = {}
  monkeypatch.setattr(setuptools, 'setup', lambda **arguments: asked.update(arguments))
  monkeypatch.chdir(ROOT)
  runpy.run_path('setup.py')
  wanted, = [line for line in asked['install_requires'] if re.match(r'jax\W', line)]
  installed = re.search(r'"jax\[\$\{ACCELERATOR\}\](.*?)"', (ROOT / 'Dockerfile').read_text())[1]
  assert f'jax{installed}' == wanted and the('ARG') == 'ACCELERATOR=cuda13'


def test_commands_run_as_an_ordinary_user_under_a_process_that_passes_signals_on():
  assert the('USER') not in ('0', 'root')
  first = next(rest for name, rest in instructions() if name == 'RUN')
  assert json.loads(the('ENTRYPOINT')) == ['tini', '--'] and 'install' in first and 'tini' in first
  assert json.loads(the('CMD'))[:3] == ['python', '-m', 'moejax.train']
