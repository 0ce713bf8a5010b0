"""A checkpoint alone says what was trained, and gives what is evaluated."""
import shutil

import pytest
from saved_checkpoints import assert_equal, save, setup_of, state_at

from moejax.training.durability.restore import restore_for_evaluation
from moejax.training.durability.stop_reasons import NoCheckpoint


def test_evaluation_restores_config_step_average_and_router_state_from_the_checkpoint_alone(tmp_path):
  save(tmp_path, 2, 4)
  (tmp_path / 'elsewhere').mkdir()
  shutil.move(tmp_path / 'checkpoints', tmp_path / 'elsewhere' / 'checkpoints')
  config, number, params, router_state = restore_for_evaluation(tmp_path / 'elsewhere')
  assert number == 4 and config == setup_of().config
  assert_equal(params, state_at(4).average)
  assert_equal(router_state, state_at(4).router_state)
  assert restore_for_evaluation(tmp_path / 'elsewhere', step=2)[1] == 2


def test_evaluation_says_where_it_looked_for_checkpoints(tmp_path):
  with pytest.raises(NoCheckpoint, match='has no checkpoints: train first'):
    restore_for_evaluation(tmp_path)
  save(tmp_path, 2)
  with pytest.raises(NoCheckpoint, match=r'no checkpoint of step 3; there are \[2\]'):
    restore_for_evaluation(tmp_path, step=3)
