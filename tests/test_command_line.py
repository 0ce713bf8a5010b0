"""The command line of all commands: which keys and values it takes, and how it refuses mistakes.

Expected values are those of Python for the same text; files are written here, with one mistake each.
"""
import ast
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict

from moejax import command_line, config_files
from moejax.config import ConfigError
from moejax.training import setup

ROOT = pathlib.Path(__file__).parents[1]
MIXTRAL = str(ROOT / 'configs/mixtral_chitchat.py')


def parse(*arguments, needs=()):
  flags = command_line.Parser('moejax.train', 'Trains.', keys='config')
  flags.add_config()
  flags.add_argument('--workdir')
  flags.add_processes()
  return flags.parse(arguments, needs)


def overridden(*arguments, file=MIXTRAL):
  return config_files.load(file, parse(*arguments).overrides)


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('argument, path, value', [
    ('model.dtype=bfloat16', 'model.dtype', 'bfloat16'),
    ('model.remat=full', 'model.remat', 'full'),
    ('model.stacking=scan', 'model.stacking', 'scan'),
    ('model.dropout=0.1', 'model.dropout', 0.1),
    ('model.moe.dispatch.implementation=xla', 'model.moe.dispatch.implementation', 'xla'),
    ('optimizer.b1=0.8', 'optimizer.b1', 0.8),
    ('model.moe.router.weigh.renormalize=never', 'model.moe.router.weigh.renormalize', 'never'),
    ('model.norm.epsilon=1e-5', 'model.norm.epsilon', 1e-5),  # a group that is left at its default
    ('model.attention.init.scale=0.5', 'model.attention.init.scale', 0.5),
])
def test_a_key_that_the_config_omits_can_be_set_alone(argument, path, value):
  config = setup.build(overridden(f'--config.{argument}')).config
  for step in path.split('.'):
    config = config[step]
  assert config == value


def test_a_group_without_a_name_keeps_the_name_that_it_has_by_default_and_its_other_keys():
  config = overridden('--config.model.embedding_init.std=0.5')
  setup.build(config)  # of the 'normal' initializer
  with pytest.raises(ConfigError, match="config.model.norm.epsilno: RMSNorm has no such key. Did you mean 'epsilon'"):
    setup.build(overridden('--config.model.norm.epsilno=1'))


def test_an_optional_group_is_created_by_its_keys():
  config = overridden('--config.model.moe.shared.name=feed_forward', '--config.model.moe.shared.hidden=8')
  assert config.model.moe.shared == ConfigDict(dict(name='feed_forward', hidden=8))
  setup.build(config)
  given_as_none = config_files.override(ConfigDict(dict(moe=dict(shared=None))), {'moe.shared.hidden': 8})
  assert given_as_none.moe.shared.hidden == 8


@pytest.mark.parametrize('argument, sentence', [
    ('training.stpes=7', "config.training.stpes: Training has no such key. Did you mean 'steps'?"),
    ('trainig.steps=7', "config.trainig: Sections has no such key. Did you mean 'training'?"),
    ('training.steps=many', "config.training.steps must be an int of at least 1, not 'many' (str)."),
    ('training.steps=1e3', 'config.training.steps must be an int of at least 1, not 1000.0 (float).'),
    ('model.moe.router.select.kk=2', "config.model.moe.router.select.kk: TopK has no such key. Did you mean 'k'?"),
    ('optimizer.clpi=1', "config.optimizer.clpi: adamw has no such key. Did you mean 'clip'?"),
    ('model.name={}', 'config.model.name must be the name of a model, not {}'),
    ('model.name=[1]', 'config.model.name must be the name of a model, not [1]'),
    ('optimizer.schedule.name=3', 'config.optimizer.schedule.name must be the name of a schedule, not 3'),
    ('model.dim.x=1', 'config.model.dim.x: config.model.dim is 128 and has no keys.'),
    ('data.batch_size[0]=1', 'config.data.batch_size[0] does not exist: config.data.batch_size is 16.'),
    ('model..dim=1', 'config.model..dim is not a config path'),
])
def test_keys_that_no_constructor_reads_are_refused_in_a_sentence(argument, sentence):
  with pytest.raises(ConfigError) as error:
    setup.build(overridden(f'--config.{argument}'))
  assert sentence in str(error.value)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('text, value', [
    ('3', 3), ('-1', -1), ('1e-3', 1e-3), ('None', None), ('True', True), ('true', True), ('false', False),
    ('none', 'none'), ('bfloat16', 'bfloat16'), ('1/E', '1/E'), ('(1, 5)', (1, 5)), ("['a']", ['a']),
    ('{"a": 1}', {'a': 1}), ("'16'", '16'), ('a=b', 'a=b'), ('', ''), ('2**10', '2**10'), ('{a: 1}', '{a: 1}'),
    ('{[]: 1}', '{[]: 1}'), ('(' * 400, '(' * 400)])
def test_a_value_is_a_python_literal_or_a_str(text, value):
  found = parse(f'--config.a.b={text}').overrides['a.b']
  assert found == value and type(found) is type(value)


NUMBERS = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(st.none() | st.text() | NUMBERS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))
def test_values_that_python_prints_are_read_back_unchanged(value):
  assert config_files.parse_value(repr(value)) == ast.literal_eval(repr(value)) == value


def test_flags_take_their_value_after_a_space_too_and_the_last_one_wins():
  given = parse('--config.mesh.data', '-1', '--workdir', 'x', '--config.a=1', '--config', 'y', '--config.a', '2')
  assert (given.workdir, given.config, given.overrides) == ('x', 'y', {'mesh.data': -1, 'a': 2})


def test_floats_and_tuples_keep_the_types_of_the_config_so_that_a_run_resumes():
  config = config_files.override(ConfigDict(dict(peak=1e-3, shots=(1, 5), steps=3)), dict(peak=1, shots=[2], steps=4))
  assert [type(config[key]) for key in ('peak', 'shots', 'steps')] == [float, tuple, int]


def test_items_of_lists_are_set_by_index():
  config = ConfigDict(dict(data=dict(augment=(dict(name='flip'), dict(name='crop', padding=1)))))
  changed = config_files.override(config, {'data.augment[1].padding': 2})
  assert changed.data.augment == (dict(name='flip'), dict(name='crop', padding=2))
  assert config.data.augment[1]['padding'] == 1
  with pytest.raises(ConfigError, match=r'config.data.augment\[2\] does not exist'):
    config_files.override(config, {'data.augment[2].padding': 2})


def test_a_config_that_is_frozen_is_copied_first():
  config = FrozenConfigDict(dict(a=dict(b=1)))
  assert config_files.override(config, {'a.b': 2, 'a.c': 3}).a == ConfigDict(dict(b=2, c=3))


def test_keys_that_refer_to_one_another_stay_equal():
  config = ConfigDict(dict(data=dict(size=8), model=dict()))
  config.model.size = config.data.get_ref('size')
  assert config_files.override(config, {'data.size': 16}).model.size == 16


# ---- a dict replaces its group --------------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [dict(name='gather'), {}, dict(a=3, b=4, c=5)])
def test_a_dict_with_a_name_or_all_keys_replaces_a_group(value):
  config = ConfigDict(dict(group=dict(a=1, b=2)))
  assert config_files.override(config, {'group': value}).group == ConfigDict(value)


def test_a_dict_creates_a_missing_or_empty_group():
  changes = {key: dict(a=1) for key in ('none', 'empty', 'new')}
  config = config_files.override(ConfigDict(dict(none=None, empty={})), changes)
  assert [config[key].a for key in ('none', 'empty', 'new')] == [1, 1, 1]


@pytest.mark.parametrize('argument, removed, advice', [
    ("model.moe={'num_experts': 4}", 'dispatch, experts, group, router', '--config.model.moe.num_experts=4'),
    ('training={"steps": 9}', 'accumulate, average, log_every', '--config.training.steps=9'),
    ('model.attention={"dropout": 0.1}', 'heads', '--config.model.attention.dropout=0.1')])
def test_a_dict_that_would_silently_remove_keys_is_refused(argument, removed, advice):
  with pytest.raises(ConfigError) as error:
    overridden(f'--config.{argument}')
  path = argument.partition('=')[0]
  assert f'config.{path}: the dict would replace the group, and remove {removed}. ' in str(error.value)
  assert f'Set single keys, e.g. {advice}' in str(error.value)


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments, sentence', [
    (['--workdirs=x'], "There is no flag --workdirs. Did you mean '--workdir'?"),
    (['--wrokdir', 'x'], "There is no flag --wrokdir. Did you mean '--workdir'?"),
    (['--training.steps=7'], 'There is no flag --training.steps. Keys are set with --config.<key>=<value>'),
    (['--confg.training.steps=7'], 'There is no flag --confg.training.steps. Keys are set with --config.<key>=<value>'),
    (['stray'], "Unrecognised argument 'stray'."),
    (['--workdir'], 'Argument --workdir: expected one argument'),
    (['--num_processes=two'], "Argument --num_processes: invalid int value: 'two'"),
    (['--config.a', '--workdir=x'], '--config.a has no value: write --config.a=<value>'),
    (['--config.a'], '--config.a has no value'),
    (['--workdir=x'], '--config is missing.'),
    ([], '--config and --workdir are missing.'),
    (['--work=x'], "There is no flag --work. Did you mean '--workdir'?"),
])
def test_a_mistake_in_flags_is_refused_in_a_sentence_with_the_nearest_flag(arguments, sentence):
  with pytest.raises(ConfigError) as error:
    parse(*arguments, needs=('config', 'workdir'))
  assert sentence in str(error.value)
  assert '\n' not in str(error.value) and 'python -m moejax.train --help' in str(error.value)


def test_help_and_mistakes_are_answered_without_jax():
  program = '''
import contextlib, importlib, io, sys
from moejax.config import ConfigError
for name in 'train', 'evaluate', 'plan', 'describe', 'systems':
  command = importlib.import_module(f'moejax.{name}')
  for flag in '--help', '--wrkdir=x':
    sys.argv, said = [name, flag], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit, ConfigError):
      command.main()
    if flag == '--help':
      assert said.getvalue().count(f'    python -m moejax.{name}') >= 3, (name, said.getvalue())
      assert '--helpfull' not in said.getvalue()
assert 'jax' not in sys.modules
'''
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


# ---- config files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
  def write(text, name='one.py', folder='settings'):
    path = tmp_path / folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)
  return write


CONFIG = 'from ml_collections import ConfigDict\n'


def test_configs_import_one_another_from_any_folder_and_leave_no_trace(write, tmp_path, monkeypatch):
  write(CONFIG + 'def get_config():\n  return ConfigDict(dict(a=1))\n', 'base.py')
  child = write('def get_config():\n  from settings import base\n  return base.get_config()\n', 'child.py')
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  before = list(sys.path)
  assert config_files.load(child).a == 1
  assert sys.path == before


def test_a_config_may_be_a_plain_dict_and_take_an_argument(write):
  path = write('def get_config(size="small"):\n  return dict(size=size)\n')
  assert config_files.load(path).size == 'small'
  assert config_files.load(f'{path}:a:b', {'other': 1}) == ConfigDict(dict(size='a:b', other=1))


@pytest.mark.parametrize('body, variant, sentence', [
    ('def get_config():\n  return None\n', '', 'must return a ConfigDict, not None (NoneType).'),
    ('def get_config():\n  return [1]\n', '', 'must return a ConfigDict, not [1] (list).'),
    ('config = {}\n', '', 'is not a config file: it has no function get_config.'),
    ('def get_config():\n  return {}\n', ':tiny', "takes no argument, but 'tiny' follows its colon: write --config="),
    ('def get_config(steps):\n  return {}\n', '', 'takes an argument: --config='),
    ("VARIANTS = 'a', 'b'\ndef get_config(v='a'):\n  return {}\n", ':c', 'There is no '),
])
def test_an_invalid_config_or_variant_is_refused_in_a_sentence(write, body, variant, sentence):
  path = write(body)
  with pytest.raises(ConfigError) as error:
    config_files.load(path + variant)
  assert sentence in str(error.value) and path in str(error.value) and '\n' not in str(error.value)


def test_variants_of_shipped_configs_are_named():
  with pytest.raises(ConfigError, match='vmoe_digits.py takes no argument'):
    config_files.load(str(ROOT / 'configs/vmoe_digits.py:tiny'))
  with pytest.raises(ConfigError, match=r'There is no .*switch_c4.py:huge. There are .*switch_c4.py:base, '):
    config_files.load(str(ROOT / 'configs/switch_c4.py:huge'))


@pytest.mark.parametrize('line, error', [
    ('return {}["b"]', "KeyError: 'b'"), ('return open("missing.txt")', 'FileNotFoundError: [Errno 2]'),
    ('return ConfigDict().sixe', 'AttributeError: '), ('import no_such_module', "No module named 'no_such_module'")])
def test_an_exception_of_a_config_file_keeps_the_traceback_from_there_on(write, line, error):
  path = write(f'{CONFIG}def get_config():\n  {line}\n')
  with pytest.raises(ConfigError) as raised:
    config_files.load(path)
  *_, said, sentence = str(raised.value).splitlines()
  assert str(raised.value).startswith(f'Traceback (most recent call last):\n  File "{path}", line 3, in get_config')
  assert error in str(raised.value)
  assert sentence == f'The config file {path} raised the exception above.'


def test_a_syntax_error_of_a_config_file_says_where(write):
  path = write('def get_config(:\n')
  with pytest.raises(ConfigError, match=r'(?s)one.py", line 1.*SyntaxError.*raised the exception above'):
    config_files.load(path)


def test_a_config_error_of_a_config_file_is_raised_as_it_is(write):
  path = write('from moejax.config import ConfigError\ndef get_config():\n  raise ConfigError("Choose another.")\n')
  with pytest.raises(ConfigError, match='^Choose another.$'):
    config_files.load(path)


@pytest.mark.parametrize('name, sentence', [
    ('nowhere/at/all.py', 'There is no such config file: nowhere/at/all.py.'),
    (str(ROOT / 'configs/vmoe_digit.py'), f'Did you mean {ROOT}/configs/vmoe_digits.py?'),
    (str(ROOT / 'configs'), 'There is no such config file: ')])
def test_a_missing_config_file_is_named_with_the_nearest(name, sentence):
  with pytest.raises(ConfigError) as error:
    config_files.load(name)
  assert sentence in str(error.value)


@pytest.mark.slow
def test_a_command_ends_with_2_and_a_sentence_from_another_folder_too(tmp_path):
  command = [sys.executable, '-m', 'moejax.train', f'--config={MIXTRAL}', f'--workdir={tmp_path}/run']
  done = subprocess.run([*command, '--config.model.dimm=3'], cwd=tmp_path, capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and "Did you mean 'dim'" in done.stderr
  assert not (tmp_path / 'run').exists()
