"""The notebooks, executed from the first cell to the last on CPU, as a reader would; how they are stored; and what the
first cell does on the machines that they may be opened on.

Whether what they draw is clear cannot be asserted: look at it. Here: no cell fails, and the last one is a picture.
"""
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COLABS = ROOT / 'colabs'
NOTEBOOKS = sorted(COLABS.glob('*.ipynb'))
FIRST_CELL = (COLABS / 'first_cell.py').read_text(encoding='utf-8').strip()
ADDRESS = re.search(r"REPOSITORY = 'https://github.com/(.*)'", FIRST_CELL)[1]


def read(path):
  return nbformat.read(path, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
# Two notebooks train a model.
run_notebook = pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem, marks=[] if path == NOTEBOOKS[0] else [pytest.mark.slow]) for path in NOTEBOOKS])


@run_notebook
def test_every_cell_works_and_the_last_one_is_a_picture(path, tmp_path, monkeypatch):
  monkeypatch.setenv('MOEJAX_FAST', '1')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  # No file of the user changes what the kernel does, and none is left behind.
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  notebook = read(path)
  client = nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3',
                                   resources={'metadata': {'path': str(tmp_path)}})
  client.execute()
  assert any('image/png' in output.get('data', {}) for output in code_cells(notebook)[-1].outputs)


@each_notebook
def test_outputs_of_a_whole_run_are_stored_and_small(path):
  notebook = read(path)
  nbformat.validate(notebook)
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert not any(output.output_type == 'error' or output.get('name') == 'stderr' for output in outputs)
  assert any('image/png' in output.get('data', {}) for output in cells[-1].outputs)
  assert path.stat().st_size < 500_000


@each_notebook
def test_a_badge_opens_it_in_colab(path):
  assert read(path).cells[0].source.startswith(
      '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/'
      f'github/{ADDRESS}/blob/main/colabs/{path.name})')


@each_notebook
def test_prose_comes_before_the_first_code_cell(path):
  assert [cell.cell_type for cell in read(path).cells[:2]] == ['markdown', 'code']


def test_there_are_notebooks_and_the_readme_lists_them_all():
  assert NOTEBOOKS
  readme = (COLABS / 'README.md').read_text(encoding='utf-8')
  for path in NOTEBOOKS:
    assert path.name in readme


# ---- the first cell, with a machine that is told -------------------------------------------------------------------


@each_notebook
def test_the_first_cell_is_the_same_everywhere(path):
  assert code_cells(read(path))[0].source == FIRST_CELL


class Machine:
  """What the first cell finds, and the commands that it runs.

  Args:
    moejax: whether it is importable.
    jax: what a process that imports jax prints: version and platform; '' where it fails.
    packages: installed distributions, `{name: version}`.
    fails: {command: what it writes to stderr; None where the command itself is missing}.
  """

  def __init__(self, monkeypatch, folder, *, moejax=False, jax='', packages={}, fails={}):
    self.commands, self._jax, self._fails = [], jax, fails
    monkeypatch.chdir(folder)
    monkeypatch.setattr(subprocess, 'run', self._run)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object() if moejax else None)
    monkeypatch.setattr(importlib.metadata, 'distributions', lambda: [
        types.SimpleNamespace(name=name, version=version) for name, version in packages.items()])
    monkeypatch.setattr(sys, 'path', list(sys.path))

  def _run(self, command, **_):
    if '-c' in command:
      return types.SimpleNamespace(returncode=int(not self._jax), stdout=f'{self._jax}\n', stderr='')
    self.commands.append(command)
    name = 'pip' if 'pip' in command else command[0]
    if name in self._fails and self._fails[name] is None:
      raise FileNotFoundError(name)
    return types.SimpleNamespace(returncode=int(name in self._fails), stdout='', stderr=self._fails.get(name, ''))

  def start(self):
    exec(FIRST_CELL, {})
    return self

  @property
  def pip(self):
    """(what is installed, what must stay as it is)."""
    command = self.commands[-1]
    assert command[:5] == [sys.executable, '-m', 'pip', 'install', '--quiet'] and command[5] == '--constraint'
    return command[7:], Path(command[6]).read_text().split()


MOEJAX = ['-e', './moejax_source[data]']


def test_on_a_machine_with_moejax_it_installs_nothing_and_prints_the_device(monkeypatch, tmp_path, capsys):
  before = list(sys.path)
  assert Machine(monkeypatch, tmp_path, moejax=True).start().commands == []
  assert sys.path == before and not list(tmp_path.iterdir())
  assert capsys.readouterr().out == f'moejax runs on 8 x cpu with jax {jax.__version__}.\n'


@pytest.mark.parametrize('found', ['', '0.7.2 cpu'], ids=['no jax', 'jax of a CPU runtime'])
def test_on_a_cpu_it_is_fetched_and_installed_with_whatever_it_needs(found, monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path, jax=found, packages={'jax': '0.7.2', 'numpy': '2.0.2'}).start()
  assert machine.commands[0] == [
      'git', 'clone', '--quiet', '--depth=1', f'https://github.com/{ADDRESS}', 'moejax_source']
  assert machine.pip == (MOEJAX, [])
  assert sys.path[0] == 'moejax_source'


@pytest.mark.parametrize('platform, packages', [
    ('gpu', {'jax': '0.10.2', 'jaxlib': '0.10.2', 'jax-cuda12-plugin': '0.10.2', 'jax-cuda12-pjrt': '0.10.2'}),
    ('gpu', {'jax': '0.12.1', 'jaxlib': '0.12.1', 'jax_cuda13_plugin': '0.12.1'}),
    ('tpu', {'jax': '0.11.0', 'jaxlib': '0.11.0', 'libtpu': '0.0.52'}),
])
def test_a_jax_that_works_on_an_accelerator_is_kept(platform, packages, monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path, jax=f'{packages["jax"]} {platform}',
                    packages={**packages, 'numpy': '2.0.2', 'jaxtyping': '0.3'}).start()
  installed, kept = machine.pip
  assert installed == MOEJAX and set(kept) == {f'{name}=={version}' for name, version in packages.items()}


@pytest.mark.parametrize('platform, packages, extra', [
    ('gpu', {'jax-cuda12-plugin': '0.7.2', 'jaxlib': '0.7.2'}, 'cuda12'),
    ('tpu', {'libtpu': '0.0.17'}, 'tpu'),
])
def test_one_that_is_too_old_is_upgraded_for_its_accelerator_and_that_is_told(platform, packages, extra, monkeypatch,
                                                                              tmp_path, capsys):
  machine = Machine(monkeypatch, tmp_path, jax=f'0.7.2 {platform}', packages={'jax': '0.7.2', **packages}).start()
  least, below = jax_range()
  assert machine.pip == ([f'jax[{extra}]>={least},<{below}', *MOEJAX], [])
  assert f'The jax 0.7.2 of this runtime is older than moejax supports (from {least}): it is upgraded.' in (
      capsys.readouterr().out)


@pytest.mark.parametrize('found, fails, sentence', [
    ('', dict(git='Cloning into ...\nfatal: Could not resolve host: github.com'),
     'moejax cannot be fetched from https://github.com/{}: fatal: Could not resolve host: github.com'),
    ('', dict(git=None), 'moejax cannot be fetched from https://github.com/{}: git is not installed.'),
    ('', dict(pip='ERROR: no space left'), 'moejax cannot be installed: ERROR: no space left'),
    ('0.13.0 gpu', {}, 'The jax 0.13.0 of this runtime is newer than moejax supports (below 0.13): choose an older '
                       'runtime version (Runtime > Change runtime type), or one without accelerator.'),
])
def test_what_goes_wrong_is_one_sentence(found, fails, sentence, monkeypatch, tmp_path):
  with pytest.raises(SystemExit) as stopped:
    Machine(monkeypatch, tmp_path, jax=found, fails=fails).start()
  assert stopped.value.code == sentence.format(ADDRESS)


def test_a_second_run_does_not_fetch_it_again(monkeypatch, tmp_path):
  (tmp_path / 'moejax_source').mkdir()
  assert [command[0] for command in Machine(monkeypatch, tmp_path).start().commands] == [sys.executable]


def test_the_versions_of_jax_are_those_that_moejax_is_installed_with():
  assert re.search(r"LEAST_JAX, BELOW_JAX = '(.*)', '(.*)'", FIRST_CELL).groups() == jax_range()


def jax_range():
  packaging = ''.join(path.read_text() for path in ROOT.glob('*') if path.name in ('setup.py', 'pyproject.toml'))
  return re.search(r'[\'"]jax>=([\d.]+),<([\d.]+)', packaging).groups()
