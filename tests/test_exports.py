"""What `import moejax` gives: names that exist, are documented, and cost nothing before they are used."""
import importlib
import inspect
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import moejax

ROOT = pathlib.Path(__file__).parents[1]
SETUP = (ROOT / 'setup.py').read_text()


@pytest.mark.parametrize('name', moejax.__all__)
def test_an_exported_name_is_that_of_its_module_and_is_documented(name):
  found = getattr(moejax, name)
  assert inspect.getdoc(found)
  if not inspect.ismodule(found):
    assert found is getattr(importlib.import_module(found.__module__), name)


def test_dir_lists_what_is_exported_and_nothing_that_is_only_used():
  assert dir(moejax) == sorted([*moejax.__all__, '__version__'])
  assert len(set(moejax.__all__)) == len(moejax.__all__) > 15


def test_commands_are_modules_with_run_under_their_names():
  assert moejax.train.run.__module__ == 'moejax.train'
  assert moejax.evaluate.run.__module__ == 'moejax.evaluate'


def test_a_name_that_is_not_exported_is_an_attribute_error_as_of_any_module():
  with pytest.raises(AttributeError, match="module 'moejax' has no attribute 'trian'"):
    moejax.trian  # noqa: B018
  with pytest.raises(ImportError, match="cannot import name 'trian' from 'moejax'"):
    exec('from moejax import trian')


def test_importing_moejax_imports_nothing_of_it_and_load_does_not_import_jax():
  program = ('import sys, moejax; assert [name for name in sys.modules if name.startswith("moejax")] == ["moejax"]; '
             'moejax.load; moejax.train; moejax.ConfigError; assert "jax" not in sys.modules')
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True)


def test_the_version_is_the_same_wherever_it_stands():
  assert runpy.run_path(str(ROOT / 'moejax/__init__.py'))['__version__'] == moejax.__version__
  assert f'\nversion: {moejax.__version__}\n' in (ROOT / 'CITATION.cff').read_text()
  assert f'\n## [{moejax.__version__}]' in (ROOT / 'CHANGELOG.md').read_text()


def test_every_command_is_a_console_script():
  scripts = dict(re.findall(r"'(moejax-[\w-]+) = ([\w.]+):script'", SETUP))
  commands = {'.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in ROOT.glob('moejax/**/*.py')
              if "\nif __name__ == '__main__':\n" in path.read_text()}
  assert set(scripts.values()) == commands, 'list it in SCRIPTS of setup.py'
  for module in commands:
    assert callable(importlib.import_module(module).script)
