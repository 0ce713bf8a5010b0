"""Strict configs: which names exist, which configs are refused, and with what message."""
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import ml_collections
import pytest
from flax import nnx

from moejax.config import ConfigError, Registry, at, call, config_path, recorded
from moejax.ranges import AtLeast, Count, Divides, Fraction, NotEmpty, Positive, Rate

FRUIT = Registry('fruit', object, context=('dim', 'rngs'))


@FRUIT('apple')
class Apple:

  def __init__(self, *, dim, weight: float = 1., kind: Literal['red', 'green'] = 'red', seeds: int | None = None,
               rings: tuple[int, ...] = (), extra: dict | None = None):
    self.arguments = dict(dim=dim, weight=weight, kind=kind, seeds=seeds, rings=rings, extra=extra)


@FRUIT('pear')
def pear(*, ripe: bool):
  return ripe


@FRUIT('module')
class Module(nnx.Module):

  def __init__(self, *, rngs, size: int):
    self.size = size


def build(**config):
  return FRUIT.build(config, 'config.fruit', dim=3, rngs=None)


def test_context_is_supplied_and_the_rest_are_keys():
  assert build(name='apple', weight=2, kind='green').arguments == dict(
      dim=3, weight=2, kind='green', seeds=None, rings=(), extra=None)


def test_a_config_dict_is_accepted_like_a_dict():
  config = ml_collections.ConfigDict(dict(name='apple', rings=(1, 2), extra=dict(a=1)))
  assert FRUIT.build(config, 'config.fruit', dim=3).arguments['extra']['a'] == 1


def test_modules_keep_their_own_signature():
  assert build(name='module', size=4).size == 4
  with pytest.raises(ConfigError, match="config.fruit.sizes: Module has no such key. Did you mean 'size'?"):
    build(name='module', sizes=4)


@pytest.mark.parametrize('config, sentence', [
    (dict(name='aple'), "config.fruit.name: there is no fruit 'aple'. Did you mean 'apple'? Allowed: apple, basket, module, orange, pear."),
    (dict(), 'config.fruit.name is missing: which fruit? One of apple, basket, module, orange, pear.'),
    (dict(name='apple', wieght=1.), "config.fruit.wieght: Apple has no such key. Did you mean 'weight'?"),
    (dict(name='apple', weight='heavy'), "config.fruit.weight must be a float, not 'heavy' (str)."),
    (dict(name='apple', weight=True), 'config.fruit.weight must be a float, not True (bool).'),
    (dict(name='apple', seeds=1.5), 'config.fruit.seeds must be an int or None, not 1.5 (float).'),
    (dict(name='apple', kind='blue'), "config.fruit.kind must be one of 'red', 'green', not 'blue' (str)."),
    (dict(name='apple', rings=(1, 'a')), "config.fruit.rings must be a tuple"),
    (dict(name='apple', extra=3), 'config.fruit.extra must be a dict or None, not 3 (int).'),
    (dict(name='apple', dim=4), 'config.fruit.dim: Apple has no such key.'),
    (dict(name='pear'), 'config.fruit.ripe is missing: pear needs it (True or False).'),
])
def test_an_invalid_config_names_the_key_and_what_is_allowed(config, sentence):
  with pytest.raises(ConfigError) as error:
    build(**config)
  assert sentence in str(error.value)


def test_a_value_that_is_not_a_dict_is_refused():
  with pytest.raises(ConfigError, match='config.fruit must be a dict with a `name`'):
    FRUIT.build('apple', 'config.fruit')


def test_a_name_means_one_thing_but_a_cell_may_be_run_again():
  registry = Registry('thing', object)

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
  assert call(pear, dict(ripe=False), 'config.pear') is False


@FRUIT('orange')
class Orange:

  def __init__(self, *, dim, heads: Count = 4, kv_heads: Annotated[Count, Divides('heads')] | None = None,
               dropout: Rate = 0., std: Positive | Literal['1/E'] = '1/E', parts: tuple[Count, ...] = (1,),
               width: Annotated[int, AtLeast(-2), Divides('dim')] = 1, share: Fraction = 0.5,
               names: Annotated[dict, NotEmpty()] = dict(a=1)):
    pass


@pytest.mark.parametrize('config', [
    dict(heads=1), dict(kv_heads=2), dict(kv_heads=None), dict(heads=9, kv_heads=3), dict(dropout=0), dict(dropout=0.999),
    dict(std='1/E'), dict(std=1), dict(parts=(1, 2)), dict(width=3), dict(share=0), dict(share=1.), dict(heads=2**31 - 1)])
def test_the_ends_of_a_range_belong_to_it_as_annotated(config):
  build(name='orange', **config)


@pytest.mark.parametrize('config, sentence', [
    (dict(heads=0), 'config.fruit.heads must be an int of at least 1, not 0.'),
    (dict(kv_heads=3), 'config.fruit.kv_heads must be an int of at least 1 and that divides heads or None, not 3.'),
    (dict(heads=6, kv_heads=4), 'kv_heads must be'),
    (dict(dropout=1.), 'config.fruit.dropout must be a float of at least 0 and below 1, not 1.0.'),
    (dict(std=0.), "config.fruit.std must be a float above 0 or one of '1/E', not 0.0."),
    (dict(std=float('nan')), 'config.fruit.std must be finite, not nan.'),
    (dict(parts=(1, 0)), 'config.fruit.parts must be a tuple whose items are each an int of at least 1, not (1, 0).'),
    (dict(width=2), 'config.fruit.width must be an int of at least -2 and that divides dim, not 2.'),
    (dict(width=0), 'that divides dim, not 0.'),
    (dict(names={}), 'config.fruit.names must be a dict that is not empty, not {}.'),
    (dict(heads=2**31), 'config.fruit.heads must be an int that fits in 32 bits, at most 2147483647; not 2147483648.'),
])
def test_a_value_out_of_range_is_refused_with_its_range(config, sentence):
  with pytest.raises(ConfigError) as error:
    build(name='orange', **config)
  assert sentence in str(error.value)


def test_a_default_invalidated_by_another_key_is_named():
  with pytest.raises(ConfigError, match=r'config.fruit.size must be an int of at least 1 and that divides whole, '
                                        r'not 4 \(the default\).'):
    call(slice_of, dict(whole=18), 'config.fruit')
  assert call(slice_of, dict(whole=16), 'config.fruit') == 4


def slice_of(*, whole: Count, size: Annotated[Count, Divides('whole')] = 4):
  return whole // size


@pytest.mark.parametrize('weight', [float('nan'), float('inf'), -float('inf')])
def test_a_non_finite_float_is_refused_at_every_key(weight):
  with pytest.raises(ConfigError, match=f'config.fruit.weight must be finite, not {weight}.'):
    build(name='apple', weight=weight)
  with pytest.raises(ConfigError, match='config.fruit.extra.a must be finite'):
    build(name='apple', extra=dict(a=weight))


@pytest.mark.parametrize('key, value', [('weight', {}), ('seeds', dict(a=dict(b=[1]))), ('name', dict(a=1))])
def test_a_dict_in_the_place_of_a_value_is_shown_on_one_line(key, value):
  with pytest.raises(ConfigError) as error:
    FRUIT.build(ml_collections.ConfigDict(dict(name='apple') | {key: value}), 'config.fruit', dim=3)
  assert '\n' not in str(error.value) and f'not {value!r}' in str(error.value)


def test_a_missing_key_that_another_must_divide_is_reported_as_missing():
  with pytest.raises(ConfigError, match='config.cake.whole is missing: slice_of needs it'):
    call(slice_of, dict(size=2), 'config.cake')


# ---- groups in groups -----------------------------------------------------------------------------------------------


@FRUIT('basket')
class Basket:

  def __init__(self, *, dim: int, first: Mapping = dict(name='apple', weight=2.), words: Sequence[str] = ()):
    self.first = FRUIT.build(first, '.first', dim=dim)


@pytest.mark.parametrize('first, weight, kind', [
    (None, 2., 'red'), (dict(kind='green'), 2., 'green'), (dict(weight=3.), 3., 'red'), ({}, 2., 'red'),
    (dict(name='apple'), 1., 'red')])  # a name says what the group is, and nothing of the default is left
def test_a_group_without_a_name_changes_the_default(first, weight, kind):
  built = build(name='basket', **({} if first is None else dict(first=ml_collections.ConfigDict(first)))).first.arguments
  assert (built['weight'], built['kind']) == (weight, kind)


def test_a_list_is_not_a_string_and_its_items_are_checked():
  for words in ('one', ('one', 2)):
    with pytest.raises(ConfigError, match='config.fruit.words must be a list whose items are each a string, not'):
      build(name='basket', words=words)
  build(name='basket', words=['one', 'two'])


@pytest.mark.parametrize('name', [{}, [1], 3, None, ('apple',)])
def test_a_value_that_cannot_be_a_name_is_refused(name):
  with pytest.raises(ConfigError) as error:
    build(name=name)
  assert f'config.fruit.name must be the name of a fruit, not {name!r}: one of apple, basket, ' in str(error.value)


def test_keys_are_recorded_with_their_readers_outermost_first():
  build(name='basket')
  with recorded() as found:
    build(name='basket', first=dict(weight=1))
  outer, inner = found
  assert (outer.where, outer.constructor, outer.name, outer.registry) == ('config.fruit', Basket, 'basket', FRUIT)
  assert list(outer.keys) == ['first', 'words']
  assert (inner.where, inner.given) == ('config.fruit.first', dict(weight=1))
  assert set(inner.keys) == {'weight', 'kind', 'seeds', 'rings', 'extra'}  # not `dim`, which is context


# ---- what may be registered -----------------------------------------------------------------------------------------

class Vehicle:
  pass


VEHICLES = Registry('vehicle', Vehicle, context=('engine',))


def test_a_class_must_derive_from_the_base_and_a_function_be_annotated_to_return_it():
  VEHICLES('car')(type('Car', (Vehicle,), {}))
  def cart() -> Vehicle:
    return Vehicle()
  VEHICLES('cart')(cart)
  def horse():
    return Vehicle()
  for name, constructor in dict(stone=type('Stone', (), {}), horse=horse).items():
    with pytest.raises(TypeError, match=f'{constructor.__qualname__} cannot be a vehicle: it must be a subclass of Vehicle'):
      VEHICLES(name)(constructor)
  assert list(VEHICLES) == ['car', 'cart']


def test_a_parameter_is_context_or_a_value_that_a_config_can_hold():
  def held(*, engine: nnx.Rngs, wheels: Count = 4, name: str | None = None, sizes: tuple[Positive, ...] = (),
           parts: Mapping = {}, colour: Literal['red'] = 'red', pair: Annotated[tuple[int, int], NotEmpty()] = (1, 2),
           other: Any = None) -> Vehicle:
    return Vehicle()
  registry = Registry('vehicle', Vehicle, context=('engine',))
  registry('held')(held)
  def motor(*, motor: nnx.Rngs) -> Vehicle:
    return Vehicle()
  with pytest.raises(TypeError, match=r'a config cannot hold its parameter motor \(Rngs\), and it is not context of a vehicle '
                                      r'\(engine\)'):
    registry('motor')(motor)


def test_only_declared_context_is_supplied():
  with pytest.raises(TypeError, match='wheels: not context of a fruit'):
    FRUIT.build(dict(name='apple'), 'config.fruit', dim=3, wheels=4)


# ---- paths ----------------------------------------------------------------------------------------------------------

TREE = Registry('tree', object)


@TREE('leaf')
class Leaf:

  def __init__(self, *, size: Count = 1, message: str = ''):
    if message:
      raise ConfigError(message)
    self.path = config_path()

  def fall(self, message):
    with at(self.path):
      with at('.fall'):
        raise ConfigError(message)


@TREE('branch')
class Branch:

  def __init__(self, *, leaves: tuple[dict, ...], message: str = ''):
    self.leaves = [TREE.build(leaf, f'.leaves[{i}]') for i, leaf in enumerate(leaves)]
    if message:
      raise ConfigError(message)


def grow(*leaves, **keys):
  return TREE.build(dict(name='branch', leaves=leaves, **keys), 'config.tree')


def test_a_constructor_knows_its_path_and_nothing_has_one_outside():
  inner = grow(dict(name='leaf'), dict(name='branch', leaves=(dict(name='leaf'),))).leaves[1].leaves[0]
  assert inner.path == 'config.tree.leaves[1].leaves[0]' and config_path() == ''


@pytest.mark.parametrize('message, complete', [
    ('.size: 3 is odd.', 'config.tree.leaves[0].size: 3 is odd.'),
    (': the tree is bare.', 'config.tree.leaves[0]: the tree is bare.'),
    (' needs light.', 'config.tree.leaves[0] needs light.'),
    ('[2]: no.', 'config.tree.leaves[0][2]: no.'),
    ('config.mesh: too small.', 'config.mesh: too small.'),
])
def test_a_message_that_continues_the_path_gets_it_once(message, complete):
  with pytest.raises(ConfigError) as error:
    grow(dict(name='leaf', message=message))
  assert str(error.value) == complete


def test_a_message_after_a_part_was_built_has_the_path_of_the_whole():
  with pytest.raises(ConfigError, match='^config.tree.leaves: too few.$'):
    grow(dict(name='leaf'), message='.leaves: too few.')


@pytest.mark.parametrize('leaf, sentence', [
    (dict(name='leaf', size=0), r'config.tree.leaves\[0\].size must be an int of at least 1, not 0.'),
    (dict(name='leaf', sise=1), r"config.tree.leaves\[0\].sise: Leaf has no such key. Did you mean 'size'?"),
    (dict(name='laef'), r"config.tree.leaves\[0\].name: there is no tree 'laef'."),
])
def test_what_is_wrong_with_the_keys_of_a_part_has_its_whole_path(leaf, sentence):
  with pytest.raises(ConfigError, match=f'^{sentence}'):
    grow(leaf)


def test_what_fails_after_building_continues_the_path_that_was_kept():
  leaf = grow(dict(name='leaf')).leaves[0]
  with pytest.raises(ConfigError, match=r'^config.tree.leaves\[0\].fall.size: too far.$'):
    leaf.fall('.size: too far.')


def test_keys_of_parts_are_recorded_under_their_whole_path():
  with recorded() as found:
    grow(dict(name='leaf'))
  assert [one.where for one in found] == ['config.tree', 'config.tree.leaves[0]']
