"""Runs whose parameters start from the checkpoints of other runs.

Oracles: the arrays that the sources were given; `Stack.scanned`; the function of a dense model, which its upcycled form
computes too; a run that was not interrupted.
"""
import json
import shutil
import zlib

import jax
import numpy as np
import pytest
from training_fakes import TinyPipeline, make_setup

from configs import upcycling_digits, vit_digits
from moejax import config_files, evaluate, train
from moejax.config import ConfigError
from moejax.functional import flatten, unflatten
from moejax.layers.stack import Stack
from moejax.routing import papers
from moejax.training import initial, loop, metrics, step, workdir
from moejax.training.durability import checkpoint, restore
from moejax.training.setup import build, default_config

UPCYCLE = (dict(ours='/moe/experts/', source='/feed_forward/', do='repeat'),
           dict(ours='/moe/router/', do='reinitialise'))
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)


def vision(stacking='unrolled', num_layers=2, image_size=8, router=None, init=None, mesh=None):
  """The config of a vision transformer; with a `router`, every second layer is sparse."""
  config = default_config()
  config.model = dict(
      name='vision', image_size=image_size, channels=1, patch_size=2, num_classes=10, dim=8, num_layers=num_layers,
      head_init='fan_in', attention=dict(heads=2), feed_forward=dict(hidden=16), stacking=stacking)
  if router is not None:
    config.model.update(sparse=dict(name='every', n=2), moe=dict(
        num_experts=4, experts=dict(name='feed_forward', hidden=16), router=router, dispatch=dict(name='grouped')))
  config.objective = dict(name='classification')
  config.data = dict(name='images', source=dict(name='digits'), image_size=image_size, channels=1, batch_size=16)
  if init is not None:
    config.init = dict(name='checkpoint', **init)
  if mesh is not None:
    config.mesh = mesh
  return config


def setup_of(config, devices=1):
  return build(config, jax.devices()[:devices])


def values(config, seed=0):
  """(parameters, router state) of `config` that depend on their unrolled path and `seed`, as they are stored."""
  unrolled = config.copy_and_resolve_references()
  unrolled.model.stacking = 'unrolled'
  trees = []
  for shapes in setup_of(unrolled).model.shapes():
    tree = unflatten({path: np.random.default_rng([seed, zlib.crc32(path.encode())])
                      .normal(scale=leaf.shape[-2]**-0.5 if leaf.ndim > 1 else 0.5, size=leaf.shape).astype(leaf.dtype)
                      for path, leaf in flatten(shapes).items()})
    if config.model.get('stacking') == 'scan' and 'blocks' in tree:
      kinds = ('dense', 'sparse') if 'moe' in config.model else ('dense', 'dense')
      tree['blocks'] = Stack(kinds * (config.model.num_layers // 2)).scanned(tree['blocks'])
    trees.append(jax.device_get(tree))
  return trees


class AnyBatch:
  def get_state(self):
    return {}


def save(folder, config, *steps, seed=0, average=False):
  """A run of `config` whose checkpoints hold `values`; if there is an average, the parameters are NaN."""
  setup = setup_of(config)
  workdir.claim(folder, setup.config)
  params, router_state = values(config, seed)
  spoiled = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
  with checkpoint.Checkpoints(folder, setup.config, setup.checkpoint, print, {}) as checkpoints:
    for number in steps:
      state = (params, router_state, {}, {}) if not average else (spoiled, router_state, {}, {}, params)
      checkpoints.save(step.TrainState(np.int32(number), *state), AnyBatch(), {})
  return folder


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  return save(tmp_path_factory.mktemp('dense'), vision(), 8)


@pytest.fixture(scope='module')
def sparse(tmp_path_factory):
  """Its router has state."""
  return save(tmp_path_factory.mktemp('sparse'), vision(router=papers.loss_free(k=1)), 8)


def read(config, devices=1):
  """({path: array} that is not drawn, lineage)."""
  setup = setup_of(config, devices)
  setup.init.check(setup)
  given, lineage = setup.init.read(setup)
  assert all(value.entries is None for value in given.values())
  return {path: value.array for path, value in given.items()}, lineage


def assert_equal(found, *trees):
  expected = {path: leaf for tree in trees for path, leaf in flatten(tree).items()}
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)


# ---- one model to the same ------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_all_parameters_and_a_new_optimizer(dense, tmp_path):
  config, said = vision(init=dict(path=str(dense))), []
  config.training.average = 0.9
  setup = setup_of(config)
  state = setup.init.state(setup, tmp_path, said.append)
  assert_equal(flatten(state.params), *values(config))
  assert_equal(flatten(state.average), *values(config))
  assert int(state.step) == 0
  fresh = setup.optimizer.transform.init(jax.tree.map(np.zeros_like, state.params))
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh)
  assert said == [f'Parameters start from {dense}, step 8: {len(flatten(state.params))} copied.']


def test_router_state_is_copied_like_parameters(sparse):
  config = vision(router=papers.loss_free(k=1), init=dict(path=str(sparse)))
  assert flatten(values(config)[1])
  assert_equal(read(config)[0], *values(config))


def test_a_rule_keeps_router_state_as_drawn(sparse):
  rules = (dict(ours='/moe/router/balance/', do='reinitialise'),)
  config = vision(router=papers.loss_free(k=1), init=dict(path=str(sparse), rules=rules))
  params, router_state = values(config)
  assert all('/moe/router/balance/' in path for path in flatten(router_state))
  assert_equal(read(config)[0], params)


def test_the_average_of_a_source_that_kept_one_is_read(tmp_path):
  save(tmp_path, vision(), 8, average=True)
  assert_equal(read(vision(init=dict(path=str(tmp_path))))[0], *values(vision()))


def test_the_last_the_best_or_a_given_step_is_read(tmp_path):
  save(tmp_path, vision(), 4, 8)
  def found(path=tmp_path, **init):
    return read(vision(init=dict(path=str(path), **init)))[1]['sources'][0]['step']
  assert (found(), found(step=4), found(tmp_path / 'checkpoints' / '4')) == (8, 4, 4)
  with pytest.raises(ConfigError, match='Cannot determine the best checkpoint'):
    found(step='best')
  with pytest.raises(ConfigError, match=r'config.init.step = 8, but config.init.path is the checkpoint of step 4'):
    found(tmp_path / 'checkpoints' / '4', step=8)
  with pytest.raises(ConfigError, match='config.init.path: .* has no checkpoint of step 5; there are'):
    found(step=5)
  with pytest.raises(ConfigError, match='config.init.path: .* has no checkpoints: train first'):
    found(tmp_path / 'nothing')


# ---- dense to sparse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('k', [2, pytest.param(5, marks=pytest.mark.slow)])
def test_an_upcycled_model_computes_the_function_of_the_dense_one_whatever_its_router_chooses(tmp_path, k):
  save(tmp_path, vit_digits.get_config(), 8)
  config = config_files.override(upcycling_digits.get_config(), {'init.path': str(tmp_path), 'model.moe.router.select.k': k})
  setup, (given, _) = setup_of(config), read(config)
  router = {path: leaf for path, leaf in flatten(values(config)[0]).items() if '/moe/router/' in path}
  assert router and not router.keys() & given.keys()
  output = jax.jit(setup.model.apply)(unflatten({**given, **router}), {}, {'image': IMAGES})
  chosen = np.asarray(output.routers['block_01'].plan.to_dense().weight)
  assert len(np.unique(chosen.argmax(-1))) > 4  # tokens differ in their experts
  np.testing.assert_allclose(chosen.sum(-1), 1, rtol=1e-5)
  dense = vit_digits.get_config()
  expected = jax.jit(setup_of(dense).model.apply)(*values(dense), {'image': IMAGES}).logits
  np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)  # a sum of k terms rounds otherwise


def test_branches_of_one_model_become_its_experts(tmp_path):
  """Branch-Train-MiX (2403.07816, section 3): experts are the branches' feed-forwards; all else is their mean."""
  paths = tuple(str(save(tmp_path / f'branch {seed}', vision(), 8, seed=seed)) for seed in range(4))
  rules = (dict(ours='/moe/experts/', source='/feed_forward/', do='stack'), UPCYCLE[1], dict(ours='', do='mean'))
  found, lineage = read(vision(router=papers.top_k_dropless(), init=dict(path=paths, rules=rules)))
  branches = [flatten(values(vision(), seed)[0]) for seed in range(4)]
  for number, branch in enumerate(branches):
    np.testing.assert_array_equal(found['blocks/1/moe/experts/wi'][number], branch['blocks/1/feed_forward/wi'])
  np.testing.assert_allclose(found['blocks/0/feed_forward/wi'],
                             sum(branch['blocks/0/feed_forward/wi'] for branch in branches) / 4, rtol=1e-6, atol=1e-6)
  assert tuple(source['path'] for source in lineage['sources']) == paths


# ---- other forms of a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('source, ours', [('scan', 'unrolled'), ('unrolled', 'scan'), ('scan', 'scan')])
def test_scanned_and_unrolled_models_start_from_each_other(tmp_path, source, ours):
  sizes = dict(num_layers=4, router=papers.loss_free(k=1))
  save(tmp_path, vision(source, **sizes), 8)
  config = vision(ours, init=dict(path=str(tmp_path)), **sizes)
  assert_equal(read(config)[0], *values(config))


def test_a_deeper_model_starts_with_the_layers_of_a_shallower_one(dense, tmp_path):
  rules = (dict(ours='^blocks/[23]/', do='reinitialise'),)
  setup = setup_of(vision('scan', num_layers=4, init=dict(path=str(dense), rules=rules)))
  state, drawn = setup.init.state(setup, tmp_path, print), initial.RandomInit().state(setup, tmp_path, print)
  params, found = flatten(values(vision())[0]), flatten(state.params)
  for path, ours in flatten(drawn.params).items():
    if not path.startswith('blocks/0/0/'):
      np.testing.assert_array_equal(found[path], params[path])
      continue
    for depth in range(4):
      expected = params[path.replace('blocks/0/0/', f'blocks/{depth}/')] if depth < 2 else ours[depth]
      np.testing.assert_array_equal(found[path][depth], expected, err_msg=path)


def test_views_of_weights_are_drawn_and_what_they_view_is_read(dense):
  """LoRA on a scanned model (2106.09685), from an unrolled one."""
  config = vision('scan', init=dict(path=str(dense)))
  config.model.view = dict(name='lora', rank=2, of='attention/(query|value)')
  with pytest.raises(ConfigError, match=r"help: rules=\(dict\(ours='\(\^\|/\)views/', do='reinitialise'\),\)\.$"):
    read(config)
  config.init.rules = (dict(ours='(^|/)views/', do='reinitialise'),)
  assert_equal(read(config)[0], *values(vision('scan')))


def test_learned_positions_are_resized_to_a_larger_grid(dense):
  rules = (dict(ours='^encoding/', do='resize_grid'),)
  found, _ = read(vision(image_size=14, init=dict(path=str(dense), rules=rules)))
  old, new = values(vision())[0]['encoding']['table'].reshape(4, 4, 8), found['encoding/table'].reshape(7, 7, 8)
  np.testing.assert_allclose(new[::2, ::2], old, rtol=1e-6)  # every second point of the new grid is one of the old
  np.testing.assert_allclose(new[1, 0], (old[0, 0] + old[1, 0]) / 2, rtol=1e-5)


@pytest.mark.parametrize('stacking', ['scan', 'unrolled'])
def test_on_a_mesh_parameters_are_sharded_and_the_same(dense, stacking):
  options = dict(stacking=stacking, router=papers.top_k_dropless(), init=dict(path=str(dense), rules=UPCYCLE))
  on_eight = vision(mesh=dict(data=1, fsdp=2, expert=4, model=1), **options)
  found = read(on_eight, devices=8)[0]
  assert_equal(found, read(vision(**options))[0])
  shardings = flatten(step.state_shardings(setup_of(on_eight, 8)).params)
  assert all(leaf.sharding == shardings[path] for path, leaf in found.items())
  wi = next(leaf for path, leaf in found.items() if path.endswith('moe/experts/wi'))
  assert wi.addressable_shards[0].data.size == wi.size / 8


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(dense, tmp_path):
  config = vision(router=papers.top_k_dropless(), init=dict(path=str(dense)))
  with pytest.raises(ConfigError, match='config.init: .*, step 8 does not fit this model. Without a source: blocks/1/moe'):
    loop.run(config, tmp_path / 'run', print)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('init, sentence', [
    (dict(name='chekpoint'), "config.init.name: there is no start of the parameters 'chekpoint'. Did you mean 'checkpoint'"),
    (dict(name='checkpoint'), 'config.init.path is missing'),
    (dict(name='checkpoint', path=()), 'config.init.path is empty'),
    (dict(name='checkpoint', path='x', step='first'), "config.init.step must be an int of at least 0 or one of 'last', 'best'"),
    (dict(name='checkpoint', path='x', rules=(dict(do='copy'),)), 'config.init.rules[0].ours is missing'),
    (dict(name='checkpoint', path='x', rules=(dict(ours='a', do='skip'),)), 'config.init.rules[0].do must be one of'),
    (dict(name='checkpoint', path='x', rules=(dict(ours='('),)), "config.init.rules[0]: ours='('"),
    (dict(name='checkpoint', path='x', unused=('(',)), "config.init.unused[0] = '(' is not a regular expression")])
def test_an_invalid_section_is_refused_in_a_sentence(init, sentence):
  config = vision()
  config.init = init
  with pytest.raises(ConfigError) as error:
    setup_of(config)
  assert sentence in str(error.value)


# ---- the run --------------------------------------------------------------------------------------------------------


class Fails(TinyPipeline):
  """Raises when batch `number` is read."""

  def __init__(self, number):
    super().__init__()
    self.number = number

  def batch(self, number):
    if number == self.number:
      raise RuntimeError('power failure')
    return super().batch(number)


def test_a_run_that_is_killed_resumes_without_its_source(tmp_path, monkeypatch):
  train_step = step.make_train_step(make_setup())
  monkeypatch.setattr(step, 'make_train_step', lambda setup: train_step)  # compiled once: set-ups differ in their start
  loop.train(make_setup(), tmp_path / 'source', print)
  setup = lambda pipeline=None: make_setup(
      pipeline=pipeline, init=dict(name='checkpoint', path=str(tmp_path / 'source'), step=6))
  loop.train(setup(), tmp_path / 'undisturbed', print)
  with pytest.raises(RuntimeError, match='power failure'):
    loop.train(setup(Fails(5)), tmp_path / 'killed', print)
  shutil.rmtree(tmp_path / 'source')
  said = []
  loop.train(setup(), tmp_path / 'killed', said.append)
  assert 'Resuming after step 5 of 8.' in said and not any('Parameters start' in line for line in said)
  killed, undisturbed = (restore.restore_for_evaluation(tmp_path / name) for name in ('killed', 'undisturbed'))
  assert_equal(flatten(killed[2]), undisturbed[2])
  rows = [[metrics.repeatable(row) for row in metrics.read(tmp_path / name)] for name in ('killed', 'undisturbed')]
  assert rows[0] == rows[1]
  assert initial.lineage(tmp_path / 'killed') == initial.lineage(tmp_path / 'undisturbed')


def test_the_lineage_names_what_was_read_and_its_ancestors(dense, tmp_path):
  save(tmp_path, vision(), 3)
  (tmp_path / 'lineage.json').write_text(json.dumps(read(vision(init=dict(path=str(dense))))[1]))
  _, found = read(vision(router=papers.top_k_dropless(), init=dict(path=str(tmp_path), rules=UPCYCLE)))
  source, = found['sources']
  assert (source['path'], source['step'], source['unused']) == (str(tmp_path), 3, [])
  ancestor, = source['lineage']['sources']
  assert (ancestor['path'], ancestor['step'], ancestor['lineage']) == (str(dense), 8, None)
  assert ancestor['crc32'] == source['crc32']  # of the same values
  assert [rule['arrays'] for rule in found['rules']] == [2, 1]
  assert found['counts'].endswith(' copied, 2 repeated to experts, 1 reinitialised')


def test_a_run_of_a_config_without_this_section_resumes(tmp_path):
  config = vision().copy_and_resolve_references()
  older = type(config)({name: value for name, value in config.items() if name != 'init'})
  workdir.claim(tmp_path, older)
  assert workdir.claim(tmp_path, config) == []


def test_another_source_is_another_run(dense, tmp_path):
  workdir.claim(tmp_path, vision(init=dict(path=str(dense))).copy_and_resolve_references())
  with pytest.raises(ConfigError, match='another config: init.path was'):
    workdir.claim(tmp_path, vision(init=dict(path='elsewhere')).copy_and_resolve_references())


@pytest.mark.slow
def test_a_fine_tuned_run_is_reported_and_evaluated_without_its_source(tmp_path):
  config = vision(init=dict(path=str(save(tmp_path / 'source', vision(), 8))))
  config.training.steps, config.optimizer.schedule.warmup = 2, 1
  config.evaluation.evaluators = dict(test=dict(name='accuracy', split='test'))
  said = []
  train.run(config, tmp_path / 'run', said.append)
  sentence = f'Parameters start from {tmp_path / "source"}, step 8: '
  assert [line for line in said if line.startswith(sentence)]
  assert sentence in (tmp_path / 'run' / 'report' / 'index.html').read_text()
  shutil.rmtree(tmp_path / 'source')
  train.run(config, tmp_path / 'run', said.append)
  assert 'accuracy' in ' '.join(evaluate.run(tmp_path / 'run', say=said.append))
