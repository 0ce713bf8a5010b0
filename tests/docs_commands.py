"""The commands of a page of the documentation, as a person would copy them into a shell."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

from experiments.runner import ROOT

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'experiments/README.md',
         ROOT / 'experiments/launch/README.md', ROOT / 'colabs/README.md',
         *(path for path in [ROOT / 'CONTRIBUTING.md'] if path.exists())]
COPIED = ('moejax', 'configs', 'experiments', 'tests', 'docs', 'colabs', 'README.md', 'setup.py', 'pyproject.toml',
          'mkdocs.yml')


def blocks(page: pathlib.Path, language: str) -> list[str]:
  """The code blocks of a language."""
  return [textwrap.dedent(code) for code in re.findall(rf'^ *```{language}\n(.*?)^ *```', page.read_text(), re.S | re.M)]


def commands(page: pathlib.Path) -> list[str]:
  """Of blocks in bash, and after the prompt in those of a console: a line each, without continuations."""
  shell = [line for block in blocks(page, 'bash') for line in _joined(block)]
  console = [line[2:] for block in blocks(page, 'console') for line in _joined(block) if line.startswith('$ ')]
  return shell + console


def run(page: pathlib.Path, folder: pathlib.Path) -> None:
  """Runs the blocks in bash one after another in a copy of the checkout. Trainings without `steps` are cut short."""
  for name in COPIED:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, folder / name)
  bin_ = folder / 'bin'
  bin_.mkdir()
  (bin_ / 'python').symlink_to(sys.executable)
  paths = (bin_, pathlib.Path(sys.executable).parent, os.environ['PATH'])
  environment = {**os.environ, 'PYTHONPATH': str(folder), 'PATH': ':'.join(map(str, paths))}
  environment.pop('XLA_FLAGS', None)
  for block in blocks(page, 'bash'):
    script = '\n'.join(_short(line) for line in re.sub(r'\\\n\s*', '', block).splitlines())
    ended = subprocess.run(['bash', '-euo', 'pipefail', '-c', script], cwd=folder, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 0, f'{script}\n{ended.stdout[-3000:]}'


def _joined(block):
  lines = re.sub(r'\\\n\s*', '', block).splitlines()
  return [line for line in lines if line.strip() and not line.lstrip().startswith('#')]


def _short(line):
  # Installing is what brought this test here.
  parts = [part for part in line.split(' && ') if not re.match(r'python3 -m venv|\. \.venv|pip install', part)]
  for n, part in enumerate(parts):
    if re.search(r'moejax\.train |host_port\.sh', part) and '--config.training.steps' not in part:
      parts[n] += ' --config.training.steps=4'
    if re.match(r'pytest\b', part):
      parts[n] += ' --collect-only -q'
  return ' && '.join(parts) or 'true'
