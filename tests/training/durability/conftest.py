"""Runs in a bucket, the same run in a folder of this machine, and another process."""
import subprocess

import pytest
import tiny_runs
from bucket_runs import PARTS
from training_fakes import make_setup

from moejax.training import loop, workdir


@pytest.fixture(scope='module')
def one_step():
  with tiny_runs.compiled_once():
    yield


@pytest.fixture
def folder(request):
  """A folder of its own in the bucket."""
  return workdir.find(f'gs://bucket/runs/{request.node.name}'.replace('[', '-').replace(']', ''))


@pytest.fixture
def run(monkeypatch, one_step):
  """Trains as the command does, but with tiny parts; returns the messages."""
  def run(folder, pipeline=None, **sections):
    said = []
    monkeypatch.setattr(loop, 'prepare', lambda config: make_setup(pipeline=pipeline, **{**PARTS, **sections}))
    monkeypatch.setattr(loop.device_memory, 'check', lambda setup: None)
    monkeypatch.setattr(loop.progress, 'describe', lambda setup: [])
    monkeypatch.setattr(loop.spanning_groups, 'notice', lambda setup: None)
    loop.run(None, folder, said.append)
    return said
  return run


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory, one_step):
  folder = tmp_path_factory.mktemp('on_disk')
  tiny = make_setup(**PARTS)
  workdir.claim(folder, tiny.config)
  loop.train(tiny, folder, lambda sentence: None)
  return folder


@pytest.fixture
def process():
  """Another process of this machine."""
  process = subprocess.Popen(['sleep', '60'])
  yield process
  process.kill()
  process.wait()
