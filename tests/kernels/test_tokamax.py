"""The adapter to tokamax passes the tests of every implementation, or reports that tokamax is missing.

tokamax needs Python 3.12. On a CPU it computes with XLA, so that its own kernels are not what is tested here.
"""
import importlib.util

from implementation_tests import ImplementationTests
from moejax.kernels import tokamax
from moejax.kernels.choice import Shape
from moejax.kernels.target import Target

TARGET, SHAPE = Target('gpu', 'NVIDIA H100 80GB HBM3'), Shape(64, 4, 8, 8, 'float32')
INSTALLED = importlib.util.find_spec('tokamax') is not None


def test_the_limit_names_tokamax_where_it_is_not_installed(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert tokamax.limit(TARGET, SHAPE).startswith('tokamax is not installed: `pip install tokamax`')


def test_there_is_a_limit_exactly_where_tokamax_is_not_installed():
  assert (tokamax.limit(TARGET, SHAPE) is None) == INSTALLED


if INSTALLED:
  class TestTokamax(ImplementationTests):
    name = 'tokamax'
