"""The notebooks, executed from the first cell to the last on CPU, as a reader would, and how they are stored.

Whether what they draw is clear cannot be asserted: look at it. Here: no cell fails, and the last one is a picture.
"""
import importlib.util
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COLABS = ROOT / 'colabs'
NOTEBOOKS = sorted(COLABS.glob('*.ipynb'))


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
def test_no_outputs_are_stored(path):
  notebook = read(path)
  nbformat.validate(notebook)
  for cell in code_cells(notebook):
    assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_prose_comes_before_the_first_code_cell(path):
  assert [cell.cell_type for cell in read(path).cells[:2]] == ['markdown', 'code']


def test_there_are_notebooks_and_the_readme_lists_them_all():
  assert NOTEBOOKS
  readme = (COLABS / 'README.md').read_text(encoding='utf-8')
  for path in NOTEBOOKS:
    assert path.name in readme


@each_notebook
def test_the_first_cell_installs_moejax_where_it_is_missing(path, monkeypatch):
  commands = run_install_cell(path, monkeypatch, importable=False)
  clone, install = commands
  assert clone[:2] == ['git', 'clone'] and 'https://github.com/moejax/moejax' in clone
  folder = clone[-1]
  assert install[:4] == [sys.executable, '-m', 'pip', 'install']
  assert install[-2:] == ['-e', f'{folder}[data]']
  assert sys.path[0] == folder


@each_notebook
def test_the_first_cell_does_nothing_where_moejax_is_importable(path, monkeypatch):
  before = list(sys.path)
  assert run_install_cell(path, monkeypatch, importable=True) == []
  assert sys.path == before


def run_install_cell(path, monkeypatch, importable):
  """The commands that the first code cell would run."""
  commands = []

  def run(command, check):
    assert check, 'a command that fails must stop the notebook'
    commands.append(command)

  monkeypatch.setattr(subprocess, 'run', run)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object() if importable else None)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  exec(code_cells(read(path))[0].source, {})
  return commands
