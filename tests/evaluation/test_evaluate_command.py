"""Evaluation from a checkpoint alone: other models of the same parameters, and refused changes."""
import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from moejax import evaluate, evaluation
from moejax.config import ConfigError
from moejax.evaluation import log
from moejax.routing import papers
from moejax.training import step, workdir
from moejax.training.durability import checkpoint, restore
from moejax.training.setup import default_config, prepare


def tiny_config():
  config = default_config()
  config.model = dict(
      name='vision', image_size=8, channels=1, patch_size=4, num_classes=10, dim=8, num_layers=2, head_init='fan_in',
      attention=dict(heads=2), feed_forward=dict(hidden=16), sparse=dict(name='last', n=1),
      moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=16), dispatch=dict(name='gather'),
               router=papers.vmoe(k=2, capacity_factor=0.5), group='batch'))
  config.objective = dict(name='classification')
  config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=120)
  config.evaluation = dict(every=1, evaluators=dict(test=dict(name='accuracy', split='test')))
  config.checkpoint = dict(every=1, keep=3, metric='eval/test/accuracy', mode='max')
  return config


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  """The folder of a run with checkpoints of steps 1 and 2, of which step 1 is better; nothing was trained."""
  folder = tmp_path_factory.mktemp('run')
  setup = prepare(tiny_config())
  workdir.claim(folder, setup.config)
  state, iterator = step.init_state(setup), iter(setup.pipeline.train(0))
  accuracy = {1: 0.9, 2: 0.1}
  with checkpoint.Checkpoints(folder, setup.config, setup.checkpoint, print, {}) as checkpoints:
    for number, value in accuracy.items():
      state = dataclasses.replace(state, step=jnp.int32(number))
      checkpoints.save(state, iterator, {'eval/test/accuracy': value})
  (folder / 'metrics.jsonl').write_text(''.join(
      json.dumps({'step': number, 'eval/test/accuracy': value}) + '\n' for number, value in accuracy.items()))
  return folder


def test_without_changes_it_repeats_the_measurement_of_training(run_dir):
  config, _, params, router_state = restore.restore_for_evaluation(run_dir)
  expected = evaluation.measure(prepare(config).evaluators, params, router_state)
  said = []
  assert evaluate.run(run_dir, say=said.append) == expected
  assert 'evaluations.jsonl' in said[-2]


def test_a_larger_capacity_drops_nothing_and_fewer_experts_per_token_change_the_result(run_dir):
  dropped = 'test/router/block_01/dropped'
  base = evaluate.run(run_dir)
  roomy = evaluate.run(run_dir, {'model.moe.router.place.eval_capacity_factor': 4.0})
  single = evaluate.run(run_dir, {'model.moe.router.place.eval_capacity_factor': 4.0, 'model.moe.router.select.k': 1})
  assert base[dropped] > 0.4 and roomy[dropped] == single[dropped] == 0  # half the slots that are needed; four times
  assert roomy['test/loss'] != single['test/loss']
  lines = log.read(run_dir)
  assert [line['metrics']['test/loss'] for line in lines[-3:]] == [x['test/loss'] for x in (base, roomy, single)]
  assert lines[-1]['overrides'] == {'model.moe.router.place.eval_capacity_factor': 4.0, 'model.moe.router.select.k': 1}


def test_an_evaluator_can_be_added(run_dir):
  results = evaluate.run(run_dir, {'evaluation.evaluators.seen.name': 'accuracy',
                                   'evaluation.evaluators.seen.split': 'train'})
  assert results['seen/examples'] == 1437 and results['test/examples'] == 360  # of the 1797 digits of scikit-learn


@pytest.mark.parametrize('overrides, message', [
    ({'model.moe.router.select.kk': 1}, "config.model.moe.router.select.kk.*Did you mean 'k'"),
    ({'model.moee.router.select.k': 1}, "config.model.moee.*Did you mean 'moe'"),
    ({'modle.dim': 1}, 'config.modle.dim has no effect on an evaluation.*config.model, config.data'),
    ({'optimizer.name': 'sgd'}, 'config.optimizer.name has no effect on an evaluation'),
    ({'model.dim.x': 1}, 'config.model.dim is 8 and has no keys'),
    ({'model.moe.router.select.k': 1.5}, 'config.model.moe.router.select.k must be an int'),
    ({'model.dim': 16}, r'The parameter blocks/0/.* is \(8, 2, 4\) in the checkpoint and \(16, 2, 8\) in the model'),
    ({'model.sparse': {'name': 'none'}}, 'The parameter blocks/1/.*absent'),
])
def test_an_invalid_change_is_refused_in_a_sentence(run_dir, overrides, message):
  with pytest.raises(ConfigError, match=message):
    evaluate.run(run_dir, overrides)


@pytest.mark.parametrize('asked, found', [('last', None), ('best', 1), ('2', 2), (2, 2)])
def test_a_word_or_an_int_names_a_step(run_dir, asked, found):
  assert restore.find_step(run_dir, asked) == found


def test_an_invalid_step_is_refused(run_dir):
  with pytest.raises(ConfigError, match="must be an int, 'last' or 'best', not 'first'"):
    restore.find_step(run_dir, 'first')


@pytest.mark.parametrize('flags, message', [
    (['--follow', '--step=2'], '--follow evaluates every checkpoint: leave out --step'),
    (['--every=5'], '--every is a number of seconds above 0, and needs --follow'),
    (['--follow', '--every=0'], '--every is a number of seconds above 0'),
    (['--follow', '--every=nan'], '--every is a number of seconds above 0'),
    (['--follow', '--every=soon'], "--every: invalid float value: 'soon'")])
def test_flags_that_contradict_each_other_are_refused(run_dir, monkeypatch, flags, message):
  monkeypatch.setattr(sys, 'argv', ['evaluate', f'--workdir={run_dir}', *flags])
  with pytest.raises(ConfigError, match=message):
    evaluate.main()


@pytest.mark.slow
def test_the_command_says_what_it_measured_and_exits_2_on_a_wrong_key(run_dir):
  command = [sys.executable, '-m', 'moejax.evaluate', f'--workdir={run_dir}']
  done = subprocess.run([*command, '--config.model.moe.router.select.k=1'], capture_output=True, text=True)
  assert done.returncode == 0 and 'Measured test at step 2' in done.stdout
  wrong = subprocess.run([*command, '--config.model.moe.router.select.kk=1'], capture_output=True, text=True)
  assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and "Did you mean 'k'" in wrong.stderr
