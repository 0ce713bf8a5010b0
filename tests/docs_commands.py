"""The commands of a page of the documentation, as a user would copy them into a shell."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

from experiments.runner import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted(ROOT.glob('colabs/README.md')), *sorted(ROOT.glob('experiments/**/README.md'))]
COPIED = ('moejax', 'configs', 'examples', 'experiments', 'tests', 'docs', 'colabs', 'README.md', 'CONTRIBUTING.md',
          'setup.py', 'pyproject.toml', 'mkdocs.yml')


def blocks(page: pathlib.Path, language: str) -> list[str]:
  """The code blocks of a language."""
  return [textwrap.dedent(code) for code in re.findall(rf'^ *```{language}\n(.*?)^ *```', page.read_text(), re.S | re.M)]


def commands(page: pathlib.Path) -> list[str]:
  """The commands of bash blocks, and those after the prompt in console blocks: one line each, continuations joined."""
  shell = [line for block in blocks(page, 'bash') for line in _commands(block)]
  console = [line[2:] for block in blocks(page, 'console') for line in _commands(block) if line.startswith('$ ')]
  return shell + console


def run(page: pathlib.Path, folder: pathlib.Path) -> None:
  """Runs the bash blocks in order in a copy of the checkout. Trainings without `steps` are shortened."""
  for name in COPIED:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, folder / name)
  environment = {**os.environ, 'PYTHONPATH': str(folder),
                 'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'}
  environment.pop('XLA_FLAGS', None)
  for block in blocks(page, 'bash'):
    script = '\n'.join(map(_short, _lines(block)))
    ended = subprocess.run(['bash', '-euo', 'pipefail', '-c', script], cwd=folder, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 0, f'{script}\n{ended.stdout[-3000:]}'


def _lines(block):
  return re.sub(r'\\\n\s*', '', block).splitlines()


def _commands(block):
  return [line for line in _lines(block) if line.strip() and not line.lstrip().startswith('#')]


def _short(line):
  # What installs, lints or builds has run where this test runs.
  parts = [part for part in line.split(' && ')
           if not re.match(r'(python3? -m venv|\. \.venv|pip|ruff|pyright|mkdocs|git|\.ci/run)\b', part)]
  for n, part in enumerate(parts):
    if re.search(r'moejax\.train |host_port\.sh', part) and '--config.training.steps' not in part:
      parts[n] += ' --config.training.steps=4'
    if re.match(r'pytest\b', part):
      parts[n] += ' --collect-only -q'
  return ' && '.join(parts) if parts else 'true'
