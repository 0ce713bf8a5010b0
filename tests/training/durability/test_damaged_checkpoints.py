"""Damaged checkpoints are never used, and the damaged file is named.

Oracle: the state that was saved before.
"""
import os
import re
import shutil

import orbax.checkpoint as ocp
import pytest
from saved_checkpoints import after, assert_equal, batches, opened, restore, save, setup_of, state_at

from moejax.training import step
from moejax.training.durability import checksums
from moejax.training.durability.restore import restore_for_evaluation
from moejax.training.durability.stop_reasons import NoCheckpoint


def array_files(folder):
  return [path for path in folder.rglob('d/*') if path.is_file()]


def cut_off(folder):
  for path in array_files(folder / 'params'):
    path.write_bytes(path.read_bytes()[:-20])


def flip_bits(folder):
  for path in array_files(folder / 'opt_state'):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def lose_an_item(folder):
  shutil.rmtree(folder / 'average')


def lose_what_says_what_it_is(folder):
  for path in (folder / 'about').iterdir():
    path.unlink()


def say_another(old, new):
  def damage(folder):
    """Its about is valid JSON with other contents."""
    path = folder / 'about' / 'metadata'
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
  return damage


next_batch_is_another = say_another('"next_index": 4', '"next_index": 5')
step_is_another = say_another('"step": 4', '"step": 6')
config_is_another = say_another(r'\"log_every\": 1', r'\"log_every\": 3')


def lose_the_checksums(folder):
  (folder / 'checksums.json').unlink()


def change_one_number(folder):
  """Files that are complete but changed, which no library can notice."""
  params = state_at(4).params
  params['wi'] = params['wi'].at[1, 2, 3].add(1e-3)
  shutil.rmtree(folder / 'params')
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / 'params', params)


@pytest.mark.parametrize('damage', [
    cut_off, flip_bits, lose_an_item, lose_what_says_what_it_is, next_batch_is_another, step_is_another,
    config_is_another, lose_the_checksums, change_one_number])
def test_a_damaged_latest_checkpoint_is_reported_and_the_previous_one_used(tmp_path, damage):
  save(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  state, iterator, said = restore(tmp_path)
  assert_equal(state, state_at(2))
  assert_equal(next(iterator), next(after(2)))
  assert len(said) == 1 and 'checkpoints/4 is damaged' in said[0] and 'step 2 instead' in said[0]
  assert '_CHECKPOINT_METADATA' not in said[0]  # which is intact
  # The same step can be saved again, and is then used.
  save(tmp_path, 4)
  assert_equal(restore(tmp_path)[0], state_at(4))


def test_if_every_checkpoint_is_damaged_the_run_stops_and_touches_nothing(tmp_path):
  save(tmp_path, 2, 4)
  for number in ('2', '4'):
    cut_off(tmp_path / 'checkpoints' / number)
  with pytest.raises(NoCheckpoint, match='No checkpoint in .* can be read'):
    restore(tmp_path)
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4']


def test_the_checksum_covers_every_bit_of_about(tmp_path):
  save(tmp_path, 2)
  path = tmp_path / 'checkpoints' / '2' / 'about' / 'metadata'
  sound = path.read_bytes()
  for place in range(0, len(sound), 7):
    changed = bytearray(sound)
    changed[place] ^= 1 << place % 8
    path.write_bytes(changed)
    with pytest.raises(checksums.Damaged, match='about/metadata differs from'):
      checksums.check(path.parents[1], 'about/')


@pytest.mark.parametrize('damage', [next_batch_is_another, step_is_another, config_is_another])
def test_evaluation_refuses_changed_files(tmp_path, damage, capsys):
  save(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  assert restore_for_evaluation(tmp_path)[1] == 2
  assert 'checkpoints/4 is damaged (Damaged: about/metadata' in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'{"score": 0.', b'\xff', b'{}', b'{"score": 9.9}'])
def test_a_damaged_score_costs_no_checkpoint(tmp_path, content):
  options = dict(keep=1, metric='eval/test/accuracy')
  save(tmp_path, 2, 4, rows={2: {'eval/test/accuracy': .3}, 4: {'eval/test/accuracy': .2}}, **options)
  (tmp_path / 'checkpoints' / '4' / 'metrics' / 'metrics').write_bytes(content)
  said = []
  with opened(tmp_path, said, **options) as checkpoints:
    assert_equal(checkpoints.restore(step.abstract_state(setup_of()), batches()), state_at(4))
    checkpoints.save(state_at(6), after(6), {'eval/test/accuracy': .1})
  assert len(said) == 1 and 'score of the checkpoint' in said[0] and 'checkpoints/4 is damaged (metrics/' in said[0]
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '6']  # the best, and the last


@pytest.mark.parametrize('damage, file', [
    (cut_off, 'params/.*d/.* has .* bytes instead of'), (flip_bits, 'opt_state/.*d/.* differs from'),
    (lose_an_item, 'average/.* is missing')])
def test_the_damaged_file_is_named(tmp_path, damage, file):
  save(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  said = restore(tmp_path)[2]
  assert re.search(f'checkpoints/4 is damaged .*{file}', said[0])


def test_an_item_that_was_damaged_before_it_was_written_is_named(tmp_path):
  """Bits that changed before they were written, which checksums cannot detect."""
  save(tmp_path, 2, 4)
  change_one_number(tmp_path / 'checkpoints' / '4')
  checksums.write(tmp_path / 'checkpoints' / '4')
  assert 'params differs from what was saved' in restore(tmp_path)[2][0]
