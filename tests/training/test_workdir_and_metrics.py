"""The folder of a run: configs and metrics survive being written and read; another run's folder is not touched."""
import json
import math
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from moejax import buckets
from moejax.config import ConfigError
from moejax.training import metrics, workdir
from moejax.training.setup import default_config

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
KEYS = st.text('abcdefgh_', min_size=1, max_size=4)
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(LEAVES, max_size=3), st.lists(LEAVES, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)))


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_config_written_and_read_back_is_equal(values):
  config = ConfigDict(values)
  again = workdir.loads(workdir.dumps(config))
  assert again == config
  assert workdir.dumps(again) == workdir.dumps(config)  # also in types: True is not 1, and a tuple is not a list


def test_the_default_config_is_one_of_them():
  assert workdir.loads(workdir.dumps(default_config())) == default_config().copy_and_resolve_references()


def test_a_config_that_holds_an_object_is_refused_by_name():
  with pytest.raises(ConfigError, match='config.model.activation must be an int, a float'):
    workdir.dumps(ConfigDict(dict(model=dict(activation=math.tanh))))


def test_a_folder_is_claimed_once_and_resumes_with_the_same_config(tmp_path):
  assert workdir.claim(tmp_path / 'run', default_config()) == []
  assert workdir.claim(tmp_path / 'run', default_config()) == []
  assert workdir.load_config(tmp_path / 'run') == default_config().copy_and_resolve_references()


def test_the_folder_of_another_run_is_left_alone_and_the_differences_are_named(tmp_path):
  workdir.claim(tmp_path, default_config())
  before = (tmp_path / 'config.json').read_text()
  other = default_config()
  other.seed = 7
  other.optimizer.schedule.peak = 0.5
  other.optimizer.b1 = 0.5
  del other.optimizer.clip
  with pytest.raises(ConfigError) as error:
    workdir.claim(tmp_path, other)
  for part in ('seed was 0, now 7', 'optimizer.schedule.peak was 0.001, now 0.5', 'optimizer.b1 was absent, now 0.5',
               'optimizer.clip was 1.0, now absent', 'Choose another --workdir'):
    assert part in str(error.value)
  assert (tmp_path / 'config.json').read_text() == before


def test_keys_that_do_not_affect_learning_may_change(tmp_path):
  workdir.claim(tmp_path, default_config())
  other = default_config()
  other.training.log_every = 7
  other.mesh.model = 2
  assert workdir.claim(tmp_path, other) == ['Resuming with another config: mesh.model was 1, now 2.',
                                            'Resuming with another config: training.log_every was 50, now 7.']
  assert workdir.load_config(tmp_path).mesh.model == 2


def test_checkpoints_without_a_config_are_refused(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ConfigError, match='no config.json'):
    workdir.claim(tmp_path, default_config())


@pytest.mark.parametrize('content, sentence', [(None, 'holds no run'), ('{"seed": ', 'cannot be read')])
def test_a_folder_without_a_readable_config_is_refused(tmp_path, content, sentence):
  if content:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ConfigError, match=sentence):
    workdir.load_config(tmp_path)


def test_a_float_placeholder_is_written_as_none(tmp_path):
  config = ConfigDict(dict(a=config_dict.placeholder(float)))
  assert json.loads(workdir.dumps(config)) == {'a': None}


def test_a_full_disk_keeps_the_old_file_and_no_partial_new_one(tmp_path, monkeypatch):
  workdir.write_atomically(tmp_path / 'a', 'old')
  def no_space(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(workdir.os, 'fsync', no_space)
  with pytest.raises(OSError, match='No space left'):
    workdir.write_atomically(tmp_path / 'a', 'new')
  assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'a': 'old'}


# ---- names of folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['s3://bucket', 'file:///tmp/run', Path('s3://bucket/run')])
def test_an_address_is_refused_as_a_folder(name):
  with pytest.raises(ConfigError, match='is an address, and a run needs a folder'):
    workdir.find(name)


@pytest.mark.parametrize('name', ['gs://bucket/run', Path('gs://bucket/run')])
def test_an_address_in_a_bucket_says_what_to_install(name, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  monkeypatch.setattr(buckets, '_set_up', buckets._set_up.__wrapped__)
  with pytest.raises(ConfigError, match=r"--workdir=gs://?bucket/run .* not installed .*: pip install 'moejax\[gcs\]'"):
    workdir.find(name)


@pytest.mark.parametrize('name', ['runs/a[b]', 'runs/*', 'a?/b', 'back\\slash'])
def test_a_path_from_which_no_checkpoint_could_be_read_back_is_refused(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match='could not be read back'):
    workdir.find(name)
  (tmp_path / name).mkdir(parents=True)
  monkeypatch.chdir(tmp_path / name)
  with pytest.raises(ConfigError, match='could not be read back'):
    workdir.find('run')  # the path of the working folder counts as well


@pytest.mark.parametrize('name', ['a b', 'runs/lr=0.1,k=2', 'a#b%20{c}', 'größe', "it's", 'a]b', '1:2'])
def test_other_names_may_be_chosen_freely(name):
  assert workdir.find(name) == Path(name)


def test_the_home_folder_is_expanded_and_an_unknown_one_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert workdir.find('~/runs/a') == tmp_path / 'runs' / 'a'
  assert workdir.find(Path('~')) == tmp_path
  with pytest.raises(ConfigError, match='there is no home folder ~none-of-us'):
    workdir.find('~none-of-us/a')


def test_a_path_that_is_not_a_folder_is_refused_in_a_sentence(tmp_path):
  (tmp_path / 'file').touch()
  (tmp_path / 'dangling').symlink_to(tmp_path / 'gone')
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  for name, problem in (('file', 'it is not a folder'), ('file/run', 'not a directory'), ('x' * 300, 'file name too long'),
                        ('dangling', 'dangling is a link to .*/gone, which does not exist'),
                        ('dangling/run', 'dangling is a link to .*/gone, which does not exist'),
                        ('loop', 'which does not exist'), ('a\0b', 'null byte')):
    with pytest.raises(ConfigError, match=f'cannot be the folder of a run: .*{problem}'):
      workdir.find(tmp_path / name)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['dangling', 'file', 'loop']


# ---- metrics --------------------------------------------------------------------------------------------------------


def write(folder, restored, *steps):
  with metrics.MetricsWriter(folder, restored) as writer:
    for step in steps:
      writer.write(step, {'train/loss': step / 3, 'router/a/load': [0.25, 0.75]})


def test_resuming_drops_the_rows_after_the_restored_step(tmp_path):
  write(tmp_path, 0, 1, 2, 3, 4, 5)
  write(tmp_path, 3, 4, 5, 6)
  assert [(row['step'], row['train/loss']) for row in metrics.read(tmp_path)] == [(n, n / 3) for n in range(1, 7)]


def test_a_line_truncated_by_a_kill_is_dropped(tmp_path):
  write(tmp_path, 0, 1, 2)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 3, "train/lo')
  assert [row['step'] for row in metrics.read(tmp_path)] == [1, 2]
  write(tmp_path, 2, 3)
  assert [row['step'] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_every_line_is_strict_json(tmp_path):
  with metrics.MetricsWriter(tmp_path, 0) as writer:
    writer.write(1, {'a': math.nan, 'b': [1., math.inf]})
  refuse = lambda constant: pytest.fail(f'{constant} is no JSON')
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line, parse_constant=refuse) == {'step': 1, 'a': None, 'b': [1., None]}


def test_the_last_row_is_known(tmp_path):
  assert metrics.MetricsWriter(tmp_path, 0).last_row == {}
  write(tmp_path, 0, 1, 2, 3)
  assert metrics.MetricsWriter(tmp_path, 2).last_row['step'] == 2
