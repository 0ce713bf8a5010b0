"""The CPU is chosen where, and only where, the plugins that are installed have no device."""
import os
import sys
import types

import pytest

from moejax import platforms


@pytest.fixture
def chosen(monkeypatch):
  """What `choose` makes of plugins and devices."""
  def chosen(plugins, devices=(), environment=None):
    monkeypatch.delenv('JAX_PLATFORMS')
    if environment is not None:
      monkeypatch.setenv('JAX_PLATFORMS', environment)
    monkeypatch.setattr(platforms, 'plugins', lambda: set(plugins))
    monkeypatch.setattr(platforms, 'has_tpu', lambda: 'tpu' in devices)
    monkeypatch.setattr(platforms, 'has_cuda', lambda: 'cuda' in devices)
    configured = []
    config = types.SimpleNamespace(update=lambda *pair: configured.append(pair))
    monkeypatch.setitem(sys.modules, 'jax', types.SimpleNamespace(config=config))
    platforms.choose()
    found = os.environ.get('JAX_PLATFORMS')
    assert configured == ([('jax_platforms', 'cpu')] if found == 'cpu' and environment is None else [])
    return found
  return chosen


@pytest.mark.parametrize('plugins', [('libtpu',), ('cuda',), ('libtpu', 'cuda')])
def test_compilers_alone_make_no_accelerator(chosen, plugins):
  assert chosen(plugins) == 'cpu'


@pytest.mark.parametrize('plugins, devices', [
    ((), ()), (('libtpu', 'cuda'), ('tpu',)), (('libtpu', 'cuda'), ('cuda',)), (('cuda', 'METAL'), ()),
    (('xla_rocm7',), ())])
def test_where_there_may_be_a_device_jax_looks_for_itself(chosen, plugins, devices):
  assert chosen(plugins, devices) is None


def test_what_the_user_has_chosen_stays(chosen):
  assert chosen(('libtpu', 'cuda'), environment='cuda,cpu') == 'cuda,cpu'
