"""Route tables, against plans given by hand and against the dense weights of small models."""
import builtins
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import analysis_fakes as fakes
from moejax.analysis import route_table
from moejax.config import ConfigError
from moejax.parallel import processes
from moejax.routing import papers
from moejax.routing.plans import DensePlan, SlotPlan, SoftPlan, TokenPlan
from moejax.training import step, workdir
from moejax.training.durability import checkpoint, stop_reasons
from moejax.training.setup import build, default_config

EXAMPLES, TOKENS, EXPERTS = 4, 2, 3


def rows(table):
  """Its rows without the layer, whole numbers as ints."""
  return [tuple(column[i].item() for name, column in vars(table).items() if name != 'layer')
          for i in range(len(table))]


def routed(plan, probs, **batch):
  """The table of one layer with this plan over a batch of four examples."""
  def route(_):
    return dataclasses.replace(fakes.output(jax.tree.map(jnp.asarray, plan), jnp.ones(EXPERTS) / EXPERTS),
                               probs=jnp.asarray(probs, jnp.float32))
  setup = fakes.setup(block_01=route)
  setup.place = functools.partial(processes.place, setup.mesh)
  return route_table.of_batch(setup, {}, {}, batch)


# Two groups of four tokens: two examples of two tokens each.
PROBS = np.arange(24).reshape(2, 4, EXPERTS) / 32
VALID = np.array([True, True, True, False])


def test_a_token_that_chooses_has_a_row_for_each_choice_kept_or_not():
  expert = np.zeros((2, 4, 2), np.int32) + [2, 0]
  weight = np.full(expert.shape, 0.5, np.float32)
  kept = np.ones(expert.shape, bool)
  kept[0, 1, 1] = False
  table = routed(TokenPlan(expert, weight, kept, num_experts=EXPERTS), PROBS, valid=VALID,
                 tokens=np.array([[7, 8], [9, 10], [11, 12], [0, 0]]))
  # example, position, token, choice, expert, weight, kept, probability
  assert rows(table) == [
      (0, 0, 7, 0, 2, 0.5, True, 2 / 32), (0, 0, 7, 1, 0, 0.5, True, 0.),
      (0, 1, 8, 0, 2, 0.5, True, 5 / 32), (0, 1, 8, 1, 0, 0., False, 3 / 32),
      (1, 0, 9, 0, 2, 0.5, True, 8 / 32), (1, 0, 9, 1, 0, 0.5, True, 6 / 32),
      (1, 1, 10, 0, 2, 0.5, True, 11 / 32), (1, 1, 10, 1, 0, 0.5, True, 9 / 32),
      (2, 0, 11, 0, 2, 0.5, True, 14 / 32), (2, 0, 11, 1, 0, 0.5, True, 12 / 32),
      (2, 1, 12, 0, 2, 0.5, True, 17 / 32), (2, 1, 12, 1, 0, 0.5, True, 15 / 32)]
  assert set(table.layer) == {'block_01'}


def test_where_experts_choose_a_row_is_a_filled_slot():
  token = np.array([[[3, 0], [1, 0], [0, 0]], [[2, 1], [0, 0], [0, 0]]], np.int32)
  filled = np.array([[[True, True], [True, False], [False, False]], [[False, True], [False, False], [False, False]]])
  weight = np.full(token.shape, 0.25, np.float32)
  table = routed(SlotPlan(token, weight, filled, num_tokens=4), PROBS, valid=VALID)
  assert rows(table) == [(1, 1, -1, 0, 0, 0.25, True, 9 / 32), (0, 0, -1, 1, 0, 0.25, True, 0.),
                         (0, 1, -1, 0, 1, 0.25, True, 4 / 32), (2, 1, -1, 1, 0, 0.25, True, 15 / 32)]


def test_where_all_experts_see_a_token_rows_are_its_weights_above_zero_the_largest_first():
  weight = np.zeros((2, 4, EXPERTS), np.float32)
  weight[0, 1] = [0.25, 0., 0.75]
  weight[1, 3] = 1.  # padding
  expected = [(0, 1, -1, 0, 2, 0.75, True, 5 / 32), (0, 1, -1, 1, 0, 0.25, True, 3 / 32)]
  assert rows(routed(DensePlan(weight), PROBS, valid=VALID)) == expected
  # The same in two halves of a slot each.
  slots = np.stack([weight / 2, weight / 2], axis=-1)
  assert rows(routed(SoftPlan(slots, slots), PROBS, valid=VALID)) == expected


def small(model, data, objective):
  config = default_config()
  config.model, config.data, config.objective = model, data, dict(name=objective)
  return config


def stack(router):
  moe = dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=router, dispatch=dict(name='reference'))
  return dict(num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=8), sparse=dict(name='every', n=2),
              moe=moe)


def images(router, **options):
  size = dict(image_size=8, channels=1)
  return small(dict(name='vision', patch_size=4, num_classes=10, dim=8, **size, **stack(router), **options),
               dict(name='images', source=dict(name='digits'), batch_size=8, **size), 'classification')


def text(model, folder, **data):
  corpus = folder / 'corpus.txt'
  corpus.write_text('the quick brown fox jumps over the lazy dog.\n' * 60)
  return small(dict(vocab_size=384, dim=8, **model),
               dict(source=dict(name='text', files=dict(train=str(corpus), test=str(corpus))),
                    tokenizer=dict(name='bytes'), batch_size=8, length=16, **data),
               'seq2seq' if 'encoder' in model else 'language_model')


CONFIGS = {
    'vmoe, with a class token': lambda _: images(papers.vmoe(k=2, capacity_factor=0.5), pool='token'),
    'expert choice': lambda _: images(papers.expert_choice()),
    'soft moe': lambda _: images(papers.soft_moe(slots=2)),
    'decoder': lambda folder: text(
        dict(name='decoder', routing_leak='slots', **stack(papers.gshard(second='all'))), folder, name='language_model'),
    'encoder-decoder': lambda folder: text(
        dict(name='encoder_decoder', encoder=stack(papers.switch()), decoder=stack(papers.top_k_dropless(k=2))), folder,
        name='span_corruption'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_the_rows_of_a_model_are_its_dense_weights_token_by_token(name, tmp_path):
  setup = build(CONFIGS[name](tmp_path), jax.devices()[:1])
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.float32(draw.normal(0, 0.5, leaf.shape)), setup.model.shapes()[0])
  batch = next(iter(setup.pipeline.evaluate('test', 8)))
  table = route_table.of_batch(setup, params, {}, batch)
  routers = jax.jit(setup.model.apply)(params, {}, batch).routers
  assert set(table.layer) == set(routers) and (len(routers) > 1) == name.startswith('encoder')
  for layer, router in routers.items():
    plan, here = router.plan, table.layer == layer
    weight = np.asarray(plan.to_dense().weight if hasattr(plan, 'to_dense') else plan.combine.sum(-1))
    weight = weight.reshape(8, -1, weight.shape[-1])
    at = table.example[here], table.position[here], table.expert[here]
    summed = np.zeros(weight.shape)
    np.add.at(summed, at, table.weight[here])
    np.testing.assert_allclose(summed, weight, atol=1e-6)
    np.testing.assert_allclose(table.probability[here], np.asarray(router.probs).reshape(weight.shape)[at], rtol=1e-6)
    if 'experts_per_token' in router.metrics:
      tokens = len(set(zip(*at[:2]))) if name != 'expert choice' else weight[..., 0].size
      assert table.kept[here].sum() / tokens == pytest.approx(float(router.metrics['experts_per_token']))
    if f'{layer[:8]}tokens' in batch or 'tokens' in batch:
      ids = batch.get(f'{layer[:8]}tokens', batch.get('tokens'))
      np.testing.assert_array_equal(table.token[here], ids[at[:2]])
    else:
      assert (table.token[here] == -1).all()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(folder of a run with a checkpoint of steps 1 and 2 that differ, setup, states by step); nothing was trained."""
  folder = tmp_path_factory.mktemp('run')
  setup = build(images(papers.vmoe(k=2, capacity_factor=0.5)))
  workdir.claim(folder, setup.config)
  first, iterator = step.init_state(setup), iter(setup.pipeline.train(0))
  states = {1: dataclasses.replace(first, step=jnp.int32(1)),
            2: dataclasses.replace(first, step=jnp.int32(2), params=jax.tree.map(lambda leaf: 2 * leaf, first.params))}
  with checkpoint.Checkpoints(folder, setup.config, setup.checkpoint, print, {}) as checkpoints:
    for state in states.values():
      checkpoints.save(state, iterator, {})
  return folder, setup, states


def same(one, other):
  return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values()))


def test_routes_are_read_from_the_folder_of_a_run_for_any_step_split_or_batch(run):
  folder, setup, states = run
  batch = next(iter(setup.pipeline.evaluate('test', 8)))
  by_step = {number: route_table.of_batch(setup, state.params, {}, batch) for number, state in states.items()}
  assert not same(by_step[1], by_step[2])
  assert same(route_table.routes(folder), by_step[2])
  assert same(route_table.routes(folder, batch, step=1), by_step[1])
  other = next(iter(setup.pipeline.evaluate('train', 8)))
  assert same(route_table.routes(folder, 'train'), route_table.of_batch(setup, states[2].params, {}, other))


def test_routing_as_in_training_has_its_noise(run):
  folder, _, _ = run
  assert not same(route_table.routes(folder, train=True), route_table.routes(folder))
  assert same(route_table.routes(folder, train=True), route_table.routes(folder, train=True))


def test_what_cannot_be_read_is_refused_in_a_sentence(run, tmp_path):
  folder, setup, states = run
  with pytest.raises(stop_reasons.NoCheckpoint, match='no checkpoint of step 3; there are'):
    route_table.routes(folder, step=3)
  with pytest.raises(ConfigError, match="there is no split 'tset'. Allowed: train, test"):
    route_table.routes(folder, 'tset')
  with pytest.raises(ConfigError, match="batch: the model reads 'image', and the batch has picture. Batches of"):
    route_table.of_batch(setup, states[1].params, {}, dict(picture=np.zeros((8, 8, 8, 1))))
  dense = images(papers.vmoe())
  dense.model.sparse = dict(name='none')
  dense = build(dense, jax.devices()[:1])
  with pytest.raises(ConfigError, match="no sparse layers, and so no routes: config.model.sparse.name is 'none'"):
    route_table.of_batch(dense, step.init_state(dense).params, {}, next(iter(dense.pipeline.evaluate('test', 8))))


def test_a_batch_that_the_devices_cannot_share_is_refused():
  setup = build(images(papers.vmoe()))
  with pytest.raises(ConfigError, match='6 examples do not divide over 8 shards'):
    route_table.of_batch(setup, *setup.model.shapes(), dict(image=np.zeros((6, 8, 8, 1), np.float32)))


def test_a_data_frame_has_the_columns_by_name(monkeypatch):
  pytest.importorskip('pandas')
  weight = np.full((2, 4, EXPERTS), 1 / 3, np.float32)
  table = routed(DensePlan(weight), PROBS, valid=VALID)
  frame = table.pandas()
  assert list(frame) == ['example', 'position', 'token', 'layer', 'choice', 'expert', 'weight', 'kept', 'probability']
  assert len(frame) == len(table) == 3 * TOKENS * EXPERTS
  np.testing.assert_array_equal(frame['expert'], table.expert)

  def without(name, *args, **kwargs):
    if name == 'pandas':
      raise ImportError(name)
    return imported(name, *args, **kwargs)
  imported = builtins.__import__
  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(ImportError, match=r"need pandas: pip install 'moejax\[data\]'"):
    table.pandas()
