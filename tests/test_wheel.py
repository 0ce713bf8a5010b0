"""What a wheel holds is enough: built from an sdist, installed in a venv of its own, it trains in an empty folder."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from moejax import config_files

ROOT = pathlib.Path(__file__).parents[1]
BUILD = 'import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))'
# Says at its end which files of moejax a program has imported, and which configs.
SITE = """
import atexit, sys
def told():
  with open({path!r}, 'a') as file:
    for name, module in list(sys.modules.items()):
      if name.partition('.')[0] in ('moejax', 'configs', 'experiments'):
        print(getattr(module, '__file__', None), file=file)
atexit.register(told)
"""
TINY = [f'--config.{key}' for key in (
    'training.steps=2', 'optimizer.schedule.warmup=1', 'data.batch_size=8', 'model.dim=16', 'model.num_layers=2',
    'model.attention.heads=2', 'model.feed_forward.hidden=16', 'model.moe.experts.hidden=16')]


def run(*command, cwd, **environment):
  clean = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True,
                        env=clean | {'JAX_PLATFORMS': 'cpu'} | environment)


def ran(*command, cwd, **environment):
  done = run(*command, cwd=cwd, **environment)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """As `python -m build` makes it: from the sdist alone."""
  folder = tmp_path_factory.mktemp('build')
  source = folder / 'checkout'
  ignored = shutil.ignore_patterns('.git', '.venv', 'build', 'dist', 'runs', '*.egg-info', '__pycache__', 'tests', 'docs')
  shutil.copytree(ROOT, source, ignore=ignored)
  sdist = ran(sys.executable, '-c', BUILD.format('sdist'), folder, cwd=source).split()[-1]
  with tarfile.open(folder / sdist) as archive:
    archive.extractall(folder, filter='data')
  unpacked = folder / sdist.removesuffix('.tar.gz')
  return folder / ran(sys.executable, '-c', BUILD.format('wheel'), folder, cwd=unpacked).split()[-1]


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """The `bin` of a venv with the wheel, that sees the packages beside it which this test runs with."""
  folder = tmp_path_factory.mktemp('venv')
  venv.create(folder)
  python = folder / 'bin/python'
  ran(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', wheel, cwd=folder)
  packages, = folder.glob('lib/python*/site-packages')
  (packages / 'beside.pth').write_text(sysconfig.get_path('purelib') + '\n')
  return folder / 'bin'


@pytest.mark.slow
def test_a_wheel_has_all_configs_and_no_name_but_its_own(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.partition('/')[0].partition('-')[0] for name in names} == {'moejax'}
  configs = {path.name for path in (ROOT / 'configs').glob('*.py')}
  assert {pathlib.Path(name).name for name in names if name.startswith('moejax/shipped/configs/')} == configs
  assert {'moejax/py.typed', 'moejax/__init__.pyi', 'moejax/kernels/tuned.json'} <= set(names)


@pytest.mark.slow
def test_a_shipped_config_is_trained_and_evaluated_from_an_empty_folder(installed, tmp_path):
  """Nothing of the checkout is imported, though a folder named configs is in the way."""
  (site := tmp_path / 'site').mkdir()
  (site / 'sitecustomize.py').write_text(SITE.format(path=str(site / 'imported')))
  (empty := tmp_path / 'empty').mkdir()
  (empty / 'configs').mkdir()
  (empty / 'configs/__init__.py').write_text('raise ImportError("the wrong configs")\n')
  flags = dict(cwd=empty, PYTHONPATH=str(site))
  ran(installed / 'moejax-train', '--config=moejax://vmoe_digits', '--workdir=run', *TINY, **flags)
  ran(installed / 'moejax-evaluate', '--workdir=run', **flags)
  assert (empty / 'run/evaluations.jsonl').is_file() and (empty / 'run/report/index.html').is_file()
  ran(installed / 'moejax-describe', 'moejax://widenet_digits', 'training', **flags)  # a config of other configs
  imported = set((site / 'imported').read_text().split()) - {'None'}
  assert len(imported) > 100
  assert all(path.startswith(str(installed.parent)) for path in imported), imported


@pytest.mark.slow
def test_what_reads_beside_the_package_reads_inside_of_a_wheel(installed, tmp_path):
  table = ran(installed / 'moejax-systems', cwd=tmp_path)
  assert table == ran(sys.executable, '-m', 'moejax.systems', cwd=ROOT)
  refused = run(installed / 'moejax-systems', '--write', cwd=tmp_path)
  assert refused.returncode == 2 and '--write is for a checkout' in refused.stderr
  unknown = run(installed / 'moejax-train', '--config=moejax://vmoe_digit', '--workdir=run', cwd=tmp_path)
  assert unknown.returncode == 2 and unknown.stderr.count('\n') == 1
  assert "There is no shipped config 'vmoe_digit'. Did you mean 'vmoe_digits'?" in unknown.stderr


@pytest.mark.slow
def test_every_console_script_answers_help_by_its_own_name(installed, tmp_path):
  scripts = sorted(path for path in installed.glob('moejax-*'))
  assert len(scripts) >= 6
  for script in scripts:
    assert re.match(f'usage: {script.name} ', ran(script, '--help', cwd=tmp_path))


def test_a_shipped_config_is_the_file_beside_the_package_in_a_checkout(monkeypatch):
  monkeypatch.setitem(sys.modules, 'configs', None)  # what the scheme finds does not depend on what has that name
  config = config_files.load('moejax://mixtral_c4:8x7b', {'training.steps': 3})
  assert config.training.steps == 3 and sys.modules['configs'] is None
  monkeypatch.undo()
  assert config == config_files.load(str(ROOT / 'configs/mixtral_c4.py:8x7b'), {'training.steps': 3})
