"""A run that began before blocks were lists of branches resumes, and learns what it would have learned then; keys that
have been renamed since are read by their names of today.

old_run.tar.gz holds four steps of `digits_config` with two layers at a constant learning rate, written then.
"""
import pathlib
import tarfile

import digits_config
import pytest

from moejax.training import loop, metrics, workdir
from moejax.training.setup import default_config

# Of steps 5 to 8, as the code of then computed them.
LOSSES = [2.202338, 2.202872, 2.301869, 2.169874]
LOADS = 'router/block_01/load'


def test_a_run_of_the_earlier_layers_resumes(tmp_path):
  with tarfile.open(pathlib.Path(__file__).with_name('old_run.tar.gz')) as archive:
    archive.extractall(tmp_path, filter='data')
  config = digits_config.get_config('8')
  config.update(dict(evaluation=dict(every=None), checkpoint=dict(every=4), model=dict(num_layers=2)))
  config.model.sparse = dict(name='every', n=2)
  config.optimizer.schedule = dict(name='constant', peak=0.01)
  config.evaluation.evaluators = {}
  said = []
  loop.run(config, tmp_path, said.append)
  assert 'Resuming after step 4 of 8.' in said
  rows = metrics.read(tmp_path)
  assert [row['step'] for row in rows] == list(range(1, 9)) and all(LOADS in row for row in rows)
  # Bit-identical on one machine; other processors round sums of a few hundred terms differently.
  assert [row['train/loss'] for row in rows[4:]] == pytest.approx(LOSSES, rel=1e-4)


@pytest.mark.parametrize('old, today', [
    (dict(encoder=dict(layers='scan', num_layers=2)), dict(encoder=dict(stacking='scan', num_layers=2))),
    (dict(layers='unrolled'), dict(stacking='unrolled')),
    (dict(moe=dict(router=dict(select=dict(name='top_2', second='all')))), dict(moe=dict(router=dict(select=dict(name='gshard_top_2', second='all'))))),
    (dict(branches=(dict(select=dict(name='top_n')),)), dict(branches=(dict(select=dict(name='thresholded_top_k')),))),
    (dict(sparse=dict(name='layers', indices=(0,))), dict(sparse=dict(name='layers', indices=(0,))))])
def test_a_run_whose_config_has_keys_of_before_resumes_by_their_names_of_today(tmp_path, old, today):
  config = default_config()
  config.update(model=old, data={}, objective={})
  workdir.claim(tmp_path, config)
  config.model = today
  assert workdir.claim(tmp_path, config) == [] and workdir.load_config(tmp_path).model.to_dict() == today
