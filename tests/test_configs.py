"""Every config that ships: documented, built and traced at full size without allocating, stepped twice at a tiny one.

Parameter counts of the paper-scale configs are compared with those the papers print.
"""
import functools
import importlib
import math
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from moejax import config_files
from moejax.config import call
from moejax.functional import flatten
from moejax.training import setup, step
from moejax.training.durability import checkpoint
from moejax.training.schedules import SCHEDULES

CONFIGS = sorted(path.stem for path in pathlib.Path(__file__).parent.parent.joinpath('configs').glob('[!_]*.py'))
RUNS = [(name, variant) for name in CONFIGS
        for variant in getattr(importlib.import_module(f'configs.{name}'), 'VARIANTS', (None,))]
# Variants of one file differ in sizes alone, which are gone at a tiny size.
FIRST = [run for i, run in enumerate(RUNS) if run[0] not in [name for name, _ in RUNS[:i]]]
by_run = pytest.mark.parametrize('name, variant', [
    pytest.param(*run, id=':'.join(filter(None, run)), marks=[] if run in FIRST else [pytest.mark.slow])
    for run in RUNS])


def load(name, variant=None):
  module = importlib.import_module(f'configs.{name}')
  return module.get_config() if variant is None else module.get_config(variant)


@functools.cache
def full_size(name, variant=None):
  return setup.prepare(load(name, variant))


def parameters(name, variant):
  return sum(math.prod(leaf.shape) for leaf in flatten(full_size(name, variant).model.shapes()[0]).values())


PAPER = re.compile(r'^Paper: (Unpublished\b|.*\(?(arXiv \d{4}\.\d{5}|and others))', re.M)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_docstring_names_paper_command_cost_and_result(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  assert PAPER.search(text.replace('\n  ', ' ')), f'Name the paper with its arXiv id, or say "Paper: Unpublished.":\n{text}'
  assert f'Command: python -m moejax.train --config=configs/{name}.py' in text
  assert re.search(r'^Cost: \S', text, re.M)
  assert re.search(r'^(Result|Expected): \S', text, re.M)


@by_run
def test_it_is_built_and_its_loss_and_evaluators_traced_at_full_size(name, variant):
  """What `prepare` does. Gradients have the shapes of parameters whatever the size; a step is taken below."""
  built = full_size(name, variant)
  params, _ = jax.eval_shape(built.model.init, jax.random.key(0))
  assert flatten(params).keys() == flatten(built.model.axes).keys() and built.evaluators


@pytest.mark.parametrize('name, variant', RUNS, ids=[':'.join(filter(None, run)) for run in RUNS])
def test_training_steps_alone_makes_it_a_short_run(name, variant):
  full = load(name, variant)
  for steps in (60, 7, 1):
    config = config_files.override(full, {'training.steps': steps}).copy_and_resolve_references()
    sections = dict(training=setup.Training, evaluation=setup.Evaluation, checkpoint=checkpoint.CheckpointConfig)
    sections = {key: call(section, config[key], f'config.{key}') for key, section in sections.items()}
    setup._check_best(types.SimpleNamespace(**sections, evaluators=config.evaluation.evaluators))
    schedule = SCHEDULES.build(config.optimizer.schedule, 'config.optimizer.schedule', steps=steps)
    rates = schedule(np.arange(steps))
    assert np.isfinite(rates).all() and rates.max() > config.optimizer.schedule.peak / 3


# The models that most configs have step in every run; compiling the others takes a quarter of an hour.
EVERY_RUN = ('vmoe_digits', 'switch_chitchat', 'sparsely_gated_chitchat', 'understanding_moe_digits')


@pytest.mark.parametrize('name, variant', [
    pytest.param(name, variant, id=name, marks=[] if name in EVERY_RUN else [pytest.mark.slow])
    for name, variant in FIRST])
def test_it_takes_two_steps_at_a_tiny_size(name, variant, tmp_path):
  built = setup.prepare(tiny(load(name, variant), tmp_path))
  state = step.init_state(built)
  before = jax.device_get(state.params)
  kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
  train_step = step.make_train_step(built)
  batches = iter(built.pipeline.train(0))
  for _ in range(2):
    state, metrics = train_step(state, built.place(next(batches)))
    assert np.isfinite(metrics['train/loss']) and not metrics['train/skipped']
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds
  assert int(state.step) == 2
  moved = [path for path, leaf in flatten(jax.device_get(state.params)).items()
           if not np.array_equal(leaf, flatten(before)[path])]
  ends = [path for path in flatten(before) if 'head' in path or 'embedding' in path] or list(flatten(before))
  assert set(moved) & set(ends)


# What the papers print, in millions: V-MoE table 8 (18291 classes of JFT there, 21843 here: up to 5 more), Switch table 9
# (Base and Large have narrower feed-forwards there than in t5x's gin files, so only XXL's and C's layout is comparable),
# ST-MoE section 5, DeepSeekMoE section 5.1 and table 7; Mixtral 8x7B as its checkpoint has it.
@pytest.mark.parametrize('name, variant, printed, tolerance', [
    ('vmoe_imagenet21k', 'H/14,every-2', 7160.8, 0.001),
    ('vmoe_imagenet21k', 'H/14,last-5', 2695.0, 0.002),
    ('vmoe_imagenet21k', '15B/14,every-2', 14_700, 0.002),
    ('switch_c4', 'c', 1_571_000, 0.001),
    ('st_moe_c4', '32b', 269_000, 0.002),
    ('mixtral_c4', '8x7b', 46_703, 0.0001),
    ('fine_grained_c4', '16b', 16_400, 0.002),
])
def test_parameter_counts_are_those_of_the_papers(name, variant, printed, tolerance):
  assert parameters(name, variant) / 1e6 == pytest.approx(printed, rel=tolerance)


# Numbers of google-research/vmoe at 942a78b (projects/soft_moe/configs and configs/vmoe_paper/pretrain_imagenet21k.py)
# and of google/flaxformer at 2ed752f (t5x/configs/moe), where scale 0.1 is that of all kernels.
@pytest.mark.parametrize('name, values', [
    ('soft_moe_imagenet21k', {(variant, 'model.moe.num_experts'): experts for variant, experts in {
        'S/16': 128, 'S/14': 256, 'B/16': 128, 'L/16': 128, 'H/14': 256}.items()} | {('H/14', 'model.pool'): None}),  # mean
    ('vmoe_imagenet21k', {(variant, 'optimizer.schedule.peak'): peak for variant, peak in {
        'S/32,last-2': 1e-3, 'B/32,every-2': 8e-4, 'B/16,every-2': 8e-4, 'L/16,every-2': 4e-4, 'H/14,last-5': 3e-4}.items()
    } | {('H/14,last-5', 'objective.router_losses'): 'sum', ('H/14,last-5', 'optimizer.clip'): 1.}),
    ('switch_c4', {('c', f'model.{side}.attention.init.scale'): 0.1 for side in ('encoder', 'decoder')}),
    ('st_moe_c4', {('32b', f'model.{side}.attention.init.scale'): 0.1 for side in ('encoder', 'decoder')}),
])
def test_numbers_are_those_of_published_configs(name, values):
  for (variant, path), value in values.items():
    assert functools.reduce(lambda config, key: config.get(key), path.split('.'), load(name, variant)) == value, path


@pytest.mark.parametrize('name', ['dselect_k_digits', 'comet_digits'])
def test_experts_that_all_see_every_token_start_apart(name):
  """Equal ones with equal weights get equal gradients, and V-MoE's noise, which tells them apart, is not in these."""
  model = full_size(name).model
  experts = {path: leaf for path, leaf in flatten(model.init(jax.random.key(0))[0]).items() if '/moe/experts/wi' in path}
  assert experts
  for leaf in experts.values():
    assert np.std(leaf, axis=0).mean() > 0.5 * np.std(leaf)


def tiny(config, folder):
  """`config` with everything narrow and short and its data replaced by a few examples; its routing untouched."""
  with config.unlocked():
    model, data = config.model, config.data
    sides = [model[side] for side in ('encoder', 'decoder') if side in model] or [model]
    if 'dim' in model:
      model.dim = 16
    for side in sides:
      shrink_layers(side)
    config.data.batch_size = 24 if config.data.get('balance') == 'tasks' else 8
    if data.name == 'images':
      model.update(image_size=8, patch_size=2, channels=1, num_classes=10)
      data.source = dict(name='digits')
      data.update(image_size=8, channels=1, crop='stretch')
    elif data.name == 'image_text':
      model.update(image_size=8, patch_size=2, channels=1, text_length=6)
      data.update(source=dict(name='digits_with_captions'), image_size=8, channels=1, length=6)
    elif data.name == 'speech':
      data.source = dict(name='speakers', num_features=model.num_features, train_examples=16)
    else:
      (folder / 'corpus.txt').write_text('the quick brown fox jumps over the lazy dog. ' * 40)
      text = dict(name='text', files=dict(train=str(folder / 'corpus.txt')))
      data.source = {'mixture': lambda old: dict(name='mixture', sources=dict.fromkeys(old.sources, text))}.get(
          data.source.name, lambda _: text)(data.source)
      data.tokenizer = dict(name='bytes')
      data.length = 32
      model.vocab_size = 384
    config.mesh.update(data=-1, fsdp=1, expert=1)
    config.training.steps = 10
    config.optimizer.schedule.warmup = 1
    if 'cooldown' in config.optimizer.schedule:
      config.optimizer.schedule.cooldown = 1
    config.evaluation.evaluators = {}
    config.checkpoint.metric = None
  return config


def shrink_layers(side):
  if 'num_layers' in side:  # a transformer
    side.attention.update(heads=2, head_dim=8)
    if 'kv_heads' in side.attention:
      side.attention.kv_heads = 1
    side.feed_forward.hidden = 16
    layout = side.get('sparse', {'name': 'none'})
    if layout['name'] in ('last', 'top'):
      layout.n = 1
    side.num_layers = {'every': layout.get('n', 2)}.get(layout['name'], 2)
  if side.get('extra_feed_forward'):
    side.extra_feed_forward.hidden = 16
  if 'moe' in side:
    moe = side.moe
    if isinstance(moe.num_experts, list):  # a pyramid, of a number for each sparse layer
      side.num_layers *= len(moe.num_experts)
    else:
      moe.num_experts = 8 if moe.router.select.get('k', 1) > 4 or 'groups' in moe.router.select else 4
    if 'experts' in moe:  # where they are whole layers, they have been shrunk
      moe.experts['hidden' if 'hidden' in moe.experts else 'filters'] = 16
    if moe.get('shared'):
      moe.shared.hidden = 16
    if isinstance(moe.get('group'), int):
      moe.group = 32
    if 'vocab_size' in moe.router.score:
      moe.router.score.vocab_size = 384
