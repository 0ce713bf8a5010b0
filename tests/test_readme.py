"""The README's instructions for adding a routing paper work as they stand: its code is run from its text."""
import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from experiments.runner import ROOT
from moejax.routing import papers

TEXT = (ROOT / 'README.md').read_text()


@pytest.fixture(scope='module')
def blocks():
  section = TEXT.split('## Add a routing paper')[1].split('\n## ')[0]
  return [textwrap.dedent(block) for block in re.findall(r'```python\n(.*?)\n *```', section, re.S)]


@pytest.mark.slow
def test_a_new_paper_costs_one_file_one_config_and_one_test(blocks, tmp_path):
  """As a user would: three files in a copy of the checkout, and the tests that find them by name."""
  paper, config, test = blocks
  for folder in ('moejax', 'configs', 'tests', 'experiments'):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__', '*.png'))
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  (tmp_path / 'moejax/routing/papers/nearest_centre.py').write_text(paper)
  (tmp_path / 'configs/nearest_centre_digits.py').write_text(config)
  (tmp_path / 'tests/routing/test_nearest_centre.py').write_text(test)
  run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
  tests = run([sys.executable, '-m', 'pytest', '-n0', '-q', '-p', 'no:cacheprovider', '-k', 'nearest_centre',
               'tests/routing', 'tests/test_configs.py'], env={**os.environ, 'PYTHONPATH': str(tmp_path)})
  assert tests.returncode == 0, tests.stdout[-3000:]
  # One test of its own, every contract of every router, and the config: documented, traced, stepped.
  assert int(re.search(r'(\d+) passed', tests.stdout)[1]) >= 15
  table = run([sys.executable, '-m', 'moejax.systems'], env={**os.environ, 'PYTHONPATH': str(tmp_path)})
  assert 'Nearest centre\n' in table.stdout, table.stderr


def test_the_router_that_the_readme_spells_out_is_the_papers():
  spelled = {}
  block = next(block for block in re.findall(r'```python\n(.*?)```', TEXT, re.S) if block.startswith('router = '))
  exec(block, spelled)
  assert spelled['router'] == dict(strip_none(papers.vmoe(k=2)))


def strip_none(fragment):
  return {key: strip_none(value) if isinstance(value, dict) else value for key, value in fragment.items()
          if value is not None}


def test_every_config_that_the_readme_lists_exists_and_all_are_listed():
  table = TEXT.split('| config | paper |')[1].split('\n\n')[0]
  listed = set(re.findall(r'`(\w+)`', table))
  assert listed == {path.stem for path in (ROOT / 'configs').glob('*.py')}
