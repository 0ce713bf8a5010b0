"""Strict configs: what can be named, what is refused, and what the refusal says."""
from typing import Any, Literal

import ml_collections
import pytest
from flax import nnx

from moejax.config import ConfigError, Registry, call

FRUIT = Registry('fruit')


@FRUIT('apple')
class Apple:

  def __init__(self, *, dim, weight: float = 1., kind: Literal['red', 'green'] = 'red', seeds: int | None = None,
               rings: tuple[int, ...] = (), extra: dict | None = None):
    self.arguments = dict(dim=dim, weight=weight, kind=kind, seeds=seeds, rings=rings, extra=extra)


@FRUIT('pear')
def pear(*, where, ripe: bool):
  return where, ripe


@FRUIT('module')
class Module(nnx.Module):

  def __init__(self, *, rngs, size: int):
    self.size = size


def build(**config):
  return FRUIT.build(config, 'config.fruit', dim=3, rngs=None)


def test_context_is_supplied_and_the_rest_are_keys():
  assert build(name='apple', weight=2, kind='green').arguments == dict(
      dim=3, weight=2, kind='green', seeds=None, rings=(), extra=None)


def test_a_config_dict_is_as_good_as_a_dict():
  config = ml_collections.ConfigDict(dict(name='apple', rings=(1, 2), extra=dict(a=1)))
  assert FRUIT.build(config, 'config.fruit', dim=3).arguments['extra']['a'] == 1


def test_modules_keep_their_own_signature():
  assert build(name='module', size=4).size == 4
  with pytest.raises(ConfigError, match="config.fruit.sizes: Module has no such key. Did you mean 'size'?"):
    build(name='module', sizes=4)


def test_the_path_is_handed_to_constructors_that_build_further():
  assert build(name='pear', ripe=True) == ('config.fruit', True)


@pytest.mark.parametrize('config, sentence', [
    (dict(name='aple'), "config.fruit.name: there is no fruit 'aple'. Did you mean 'apple'? Allowed: apple, module, pear."),
    (dict(), 'config.fruit.name is missing: which fruit? One of apple, module, pear.'),
    (dict(name='apple', wieght=1.), "config.fruit.wieght: Apple has no such key. Did you mean 'weight'?"),
    (dict(name='apple', weight='heavy'), "config.fruit.weight must be a number, not 'heavy' (str)."),
    (dict(name='apple', weight=True), 'config.fruit.weight must be a number, not True (bool).'),
    (dict(name='apple', seeds=1.5), 'config.fruit.seeds must be a whole number or None, not 1.5 (float).'),
    (dict(name='apple', kind='blue'), "config.fruit.kind must be one of 'red', 'green', not 'blue' (str)."),
    (dict(name='apple', rings=(1, 'a')), "config.fruit.rings must be a tuple"),
    (dict(name='apple', extra=3), 'config.fruit.extra must be a dict or None, not 3 (int).'),
    (dict(name='apple', dim=4), 'config.fruit.dim: Apple has no such key.'),
    (dict(name='pear'), 'config.fruit.ripe is missing: pear needs it (True or False).'),
])
def test_what_cannot_be_built_says_which_key_and_what_is_allowed(config, sentence):
  with pytest.raises(ConfigError) as error:
    build(**config)
  assert sentence in str(error.value)


def test_something_that_is_no_dict_is_refused():
  with pytest.raises(ConfigError, match='config.fruit must be a dict with a `name`'):
    FRUIT.build('apple', 'config.fruit')


def test_a_name_means_one_thing_but_a_cell_may_be_run_again():
  registry = Registry('thing')

  def define():
    @registry('one')
    def one(*, a: Any = 0):
      return a
    return one

  define()
  define()
  with pytest.raises(ValueError, match="thing 'one' exists already"):
    registry('one')(pear)


def test_call_builds_without_a_name():
  assert call(pear, dict(ripe=False), 'config.pear') == ('config.pear', False)
