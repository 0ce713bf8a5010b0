"""describe lists the keys that a config reads: each is explained, and each can be set from the command line.

The config that the command line alone makes, of every key that is listed, must list the same keys and values again.
"""
import functools
import importlib
import pathlib

import pytest

from moejax import command_line, config_files, describe
from moejax.config import ConfigError, Registry

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in ROOT.glob('configs/[!_]*.py'))
by_config = pytest.mark.parametrize('name', CONFIGS)


def load(name):
  return importlib.import_module(f'configs.{name}').get_config()


@functools.cache
def listed(name):
  return describe.keys(load(name))


def of(name):
  return {key.path: key for key in listed(name)}


@by_config
def test_every_key_of_a_config_is_explained_in_a_line_and_has_a_type(name):
  keys = listed(name)
  assert len({key.path for key in keys}) == len(keys) > 60
  assert [key.path for key in keys if not key.line or not key.type] == []
  assert [(key.path, one) for key in keys for one, what in key.names.items() if not what] == []


@by_config
def test_every_key_that_is_listed_can_be_set_from_the_command_line(name):
  keys = listed(name)
  config = load(name)
  # Items of a list are set one by one only where there is a list.
  lists = {key.path: functools.reduce(lambda node, step: node[step], key.path.split('.'), config)
           for key in keys if f'{key.path}[0]' in of(name)}
  flags = [f'--config.{key.path}={key.value!r}' for key in keys if not key.group]
  overrides = command_line.Parser('test', '', keys='config').parse(flags).overrides
  made = config_files.override({}, {**lists, **overrides})
  again = describe.keys(made)
  assert [(key.path, key.value, type(key.value), key.group) for key in again] == [
      (key.path, key.value, type(key.value), key.group) for key in keys]


def test_a_key_says_type_range_default_and_value():
  keys = of('vmoe_digits')
  assert keys['model.dim'] == describe.Key('model.dim', 'an int of at least 1', keys['model.dim'].line, value=64)
  assert keys['model.channels'].value == 1 and keys['model.channels'].default == 3
  assert keys['model.stacking'].type == "one of 'scan', 'unrolled'"
  assert keys['model.moe.shared'].type == 'a dict or None' and keys['model.moe.shared'].value is None
  assert keys['training.average'].type.endswith('or None')
  assert keys['optimizer.b1'].default == keys['optimizer.b1'].value == 0.9  # left out by the config
  assert keys['optimizer.clip'].line == (
      'maximum global norm, to which larger gradients are scaled down; None: no clipping.')


def test_alternatives_are_listed_below_the_name_with_a_line_each():
  keys = of('vmoe_digits')
  assert keys['model.moe.dispatch.name'].value == 'gather'
  assert set(keys['model.moe.dispatch.name'].names) == {'einsum', 'gather', 'grouped', 'reference', 'segments'}
  assert keys['model.moe.dispatch.name'].names['gather'] == describe.sentence(registry_of('dispatcher')['gather'])
  # In `balance` it is the keys that name.
  assert 'switch' in keys['model.moe.router.balance'].names and 'model.moe.router.balance.load.name' not in keys
  assert keys['model.moe.router.balance.load'].type == 'a float, or a dict of coefficient'


def registry_of(what):
  return next(registry for registry in Registry.all if registry.what == what)


def test_a_norm_that_a_model_passes_to_its_sides_is_a_key_of_the_model():
  keys = of('t5_chitchat')
  assert 'model.norm.epsilon' in keys and 'model.encoder.norm' not in keys and 'model.encoder.num_layers' in keys


def test_every_name_of_every_registry_is_explained():
  assert [(registry.what, name) for registry in Registry.all for name, what in describe.names(registry).items()
          if not what and registry[name].__module__.startswith('moejax.')] == []


def test_a_path_lists_its_group_alone_and_a_wrong_one_names_the_nearest():
  paths = [key.path for key in describe.within(listed('vmoe_digits'), 'config.model.moe.dispatch')]
  assert paths[:2] == ['model.moe.dispatch', 'model.moe.dispatch.name'] and all(
      path.startswith('model.moe.dispatch') for path in paths)
  with pytest.raises(ConfigError, match="The config has no key modle. Did you mean 'model'?"):
    describe.within(listed('vmoe_digits'), 'modle')
  with pytest.raises(ConfigError, match="no key model.moe.dispatchh. Did you mean 'model.moe.dispatch'?"):
    describe.within(listed('vmoe_digits'), 'model.moe.dispatchh')


KEYS = [describe.Key('a', 'a dict', 'a group.', group=True),
        describe.Key('a.name', 'which thing, by name', 'one thing.', 'x', names=dict(x='One thing.', other='Two.')),
        describe.Key('a.n', 'an int', 'how many.', 3, default=2),
        describe.Key('a.b[0]', 'an int', '', 1, default=1)]


def test_it_is_written_as_a_tree():
  assert describe.as_text(KEYS).splitlines() == [
      'a',
      '      A dict. A group.',
      "  name = 'x' (needed)",
      '        Which thing, by name. One thing.',
      '          x      One thing.',
      '          other  Two.',
      '  n = 3 (default 2)',
      '        An int. How many.',
      '    [0] = 1',
      '          An int.']


def test_it_is_written_as_nested_lists_of_markdown():
  assert describe.as_markdown(KEYS[1:3]).splitlines() == [
      "- **name** = `'x'` (needed): Which thing, by name. One thing.",
      '  - `x`: One thing.',
      '  - `other`: Two.',
      '- **n** = `3` (default `2`): An int. How many.']


class Base:
  """A base.

  Config:
    inherited, other: of the
      base.
  """


class Derived(Base):

  def __init__(self, own):
    """Args:
      own: of its own.
    """


@pytest.mark.parametrize('key, line', [('inherited', 'of the base.'), ('other', 'of the base.'), ('own', 'of its own.'),
                                       ('her', ''), ('base', '')])
def test_a_line_comes_from_the_docstring_that_has_it_even_if_inherited(key, line):
  assert describe.docstring_entry(Derived, key) == line


def test_the_command_prints_a_group_of_a_config_that_keys_change(monkeypatch, capsys):
  monkeypatch.setattr(describe, '_devices', lambda config: None)  # those of the tests
  monkeypatch.setattr('sys.argv', ['describe', str(ROOT / 'configs/vit_digits.py'), 'optimizer.schedule',
                                   '--config.optimizer.schedule={"name": "linear", "peak": 2.0}', '--format', 'md'])
  describe.main()
  said = capsys.readouterr().out
  for part in '- **schedule**: A dict.', '**peak** = `2.0` (needed)', '- `cosine`: Cosine decay':
    assert part in said


def test_without_a_config_the_command_prints_all_names(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['describe'])
  describe.main()
  assert '\ntokenizer\n' in (said := capsys.readouterr().out) and '\n  bytes' in said.replace('      ', '')
