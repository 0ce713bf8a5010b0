"""Plans of a training step, against sizes by hand and, where it can run, JAX's own analysis.

Machines here are eight simulated devices that are taken for two hosts of four GPUs, so that no compiler is needed but
the CPU's; `-k compile` plans for TPU and H100 as well.
"""
import dataclasses
import json
import math
import re

import jax
import pytest

from moejax import plan as plan_lib
from moejax import units
from moejax.config import ConfigError
from moejax.config_files import override, parse_value
from moejax.functional import flatten
from moejax.parallel.chips import CHIPS
from moejax.planning import ahead_of_time, memory, plan_text, topologies
from moejax.planning.advice import advise
from moejax.planning.topologies import Topology
from moejax.routing import papers
from moejax.training import setup
from moejax.training.setup import default_config

GIB = 2**30


def machine(**chip):
  return Topology('simulated:2x4', dataclasses.replace(CHIPS['h100'], **chip), (2, 4), tuple(jax.devices()))


def images():
  """A sparse vision transformer of one layer, in shards; its parameters are averaged."""
  config = default_config()
  config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=16)
  config.objective = dict(name='classification')
  config.model = dict(
      name='vision', image_size=8, channels=1, patch_size=4, num_classes=10, dim=8, num_layers=1,
      attention=dict(heads=2), feed_forward=dict(hidden=8), sparse=dict(name='every', n=1),
      moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=papers.vmoe(k=1),
               dispatch=dict(name='einsum'), group='sequence'))
  config.training.average = 0.9
  config.mesh = dict(data=1, fsdp=4, expert=2, model=1)
  return config


def text(**changes):
  """A decoder whose experts are most of it; changes are named `section__key`."""
  config = default_config()
  config.model = dict(
      name='decoder', vocab_size=258, dim=8, num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=8),
      sparse=dict(name='every', n=1), stacking='scan', remat='none',
      moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=512), router=papers.switch(capacity_factor=1.),
               dispatch=dict(name='einsum'), group='batch'))
  config.objective = dict(name='language_model')
  config.data = dict(name='language_model', source=dict(name='chitchat'), tokenizer=dict(name='bytes'), length=8,
                     batch_size=16)
  for path, value in changes.items():
    *sections, key = path.split('__')
    section = config
    for name in sections:
      section = section[name]
    section[key] = value
  return config


@pytest.fixture(scope='module')
def prepared():
  return setup.prepare(images(), machine().devices)


@pytest.fixture(scope='module')
def plan(prepared):
  return ahead_of_time.plan(prepared, machine())


def test_parameters_and_state_are_what_one_device_holds(prepared, plan):
  """Of the experts [4,8,8] a device has 1/2 * 1/4, of other matrices over 'embed' an eighth, of the rest all."""
  split = {'expert': 2, 'expert_embed': 4, 'embed': 8}
  expected, total = 0, 0
  for path, leaf in flatten(prepared.model.shapes()[0]).items():
    ways = math.prod(split.get(name, 1) for name in dict.fromkeys(flatten(prepared.model.axes)[path]))
    expected += 4 * math.prod(leaf.shape) // ways
    total += math.prod(leaf.shape)
  assert plan.parameters['total'] == total
  assert plan.memory.parameters == plan.memory.gradients == expected
  # AdamW's two moments and its two counters; the average and the step.
  assert plan.memory.optimizer == 2 * expected + 8
  assert plan.memory.others == expected + 4
  # 2 of 16 images of 8 x 8 float32, an int32 label and a bool each.
  assert plan.memory.batch == 2 * (64 * 4 + 4 + 1)


def test_the_total_is_the_compilers_and_holds_all_parts(plan):
  found = plan.memory
  held = found.parameters + found.optimizer + found.others + found.batch
  assert found.total == held + found.temporaries + found.unaliased
  assert found.fits and plan.advice is None
  assert plan_text.verdict(plan).startswith(f'It fits: {units.size(found.total)} of 79.11 GiB per chip')


def test_the_step_trains_three_times_the_forward_flops_and_recomputes_none(plan):
  """One sparse layer of width 8 on 16 images of 4 patches; a patch uses one expert of 8 hidden units.

  FLOPs of a token: patches 2*16*8, attention 4*2*8*8 and 2*2*4*8 with its 4 keys, router 2*8*4, expert 2*2*8*8; of an
  image: head 2*8*10.
  """
  token = 2 * 16 * 8 + 4 * 2 * 8 * 8 + 2 * 2 * 4 * 8 + 2 * 8 * 4 + 2 * 2 * 8 * 8
  assert plan.model_flops == 3 * 16 * (4 * token + 2 * 8 * 10)
  assert plan.flops * 8 >= plan.model_flops - 3 * 16 * 4 * 2 * 16 * 8  # nothing differentiates by the image


def test_collectives_of_the_program_are_timed_and_summed(plan):
  rows = ahead_of_time.by_place(plan.program.collectives)
  assert rows and all(row['runs'] > 0 and row['bytes'] > 0 for row in rows)
  assert plan.program.estimate.communication > 0
  assert 0 < plan.mfu < 1


def test_a_plan_can_be_written_and_read(plan, tmp_path):
  read = json.loads(json.dumps(ahead_of_time.as_dict(plan)))
  assert read['mesh'] == dict(data=1, fsdp=4, expert=2, model=1)
  assert read['memory_bytes']['total'] == plan.memory.total
  assert read['program']['seconds']['step'] == plan.program.estimate.step
  text = plan_text.write(plan)
  assert all(line in text for line in read['assumptions'])
  assert 'simulated:2x4: 8 x NVIDIA H100' in text


# ---- what does not fit ----------------------------------------------------------------------------------------------


def with_memory(**parts):
  zeros = dict.fromkeys(('parameters', 'optimizer', 'others', 'batch', 'gradients', 'activations', 'temporaries',
                         'unaliased', 'total'), 0)
  return memory.Memory(**zeros | dict(total=20 * GIB, available=10 * GIB) | parts)


ADVICE = {
    'experts on every device': (
        {}, dict(optimizer=15 * GIB), 'First try --config.mesh.fsdp=8: '),
    'experts in as many shards as there are': (
        dict(mesh__expert=8, optimizer=dict(name='adafactor', schedule=dict(name='constant', peak=1e-3))),
        dict(parameters=15 * GIB), 'the smallest topology that holds it is --topology=h100:2x8 '),
    'parameters on every device': (
        dict(model__moe__experts__hidden=8), dict(optimizer=15 * GIB), 'First try --config.mesh.fsdp=8: '),
    'a stage of ZeRO that leaves parameters whole': (
        dict(mesh__fsdp=8, sharding__zero=1), dict(parameters=15 * GIB), 'First try --config.sharding.zero=3: '),
    'activations of all layers': (
        dict(training__accumulate=2), dict(activations=15 * GIB), 'First try --config.model.remat=full: '),
    'activations of rematerialised layers': (
        dict(model__remat='full'), dict(activations=15 * GIB), 'First try --config.training.accumulate=2: '),
    'one example a device, and its hidden units split': (
        dict(model__remat='full', model__moe__group='sequence', training__accumulate=2), dict(temporaries=10 * GIB),
        'First try --config.mesh.model=2 --config.training.accumulate=4: '),
    'one-hot matrices of a whole batch': (
        {}, dict(temporaries=15 * GIB), 'First try --config.model.moe.group=sequence: '),
    'a block that needs much': (
        dict(model__moe__group='sequence'), dict(temporaries=15 * GIB), 'First try --config.training.accumulate=2: '),
}


@pytest.mark.parametrize('what', ADVICE)
def test_the_first_thing_to_change_is_what_an_estimate_says_fits(what):
  changes, parts, expected = ADVICE[what]
  prepared = setup.prepare(text(**changes), machine().devices)
  advice = advise(prepared, with_memory(**parts), machine())
  assert expected in advice
  if 'First try' in advice:
    keys = {key: parse_value(value) for key, value in re.findall(r'--config\.([\w.]+)=(\w+)', advice)}
    setup.prepare(override(prepared.config, keys), machine().devices)


def test_a_step_that_does_not_fit_says_by_how_much(prepared, plan):
  full = dataclasses.replace(plan.memory, available=plan.memory.total - 1)
  assert not full.fits
  verdict = plan_text.verdict(dataclasses.replace(plan, memory=full, advice=advise(prepared, full, machine())))
  assert re.match(r'It does not fit: a step needs ([\d.]+ \w+) per chip, which has \1: 1 B too little. The largest part', verdict)


@pytest.mark.parametrize('message, expected', [
    ('RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
     'temporaries (16.21T) exceeds available HBM (30.75G). HLO module: jit_step.', (int(16.21 * 2**40), True)),
    ('Ran out of memory in memory space hbm. Used 31.20G of 15.75G hbm. Exceeded hbm capacity by 15.45G.',
     (int(31.2 * 2**30), False)),
])
def test_the_compilers_refusals_are_read(message, expected):
  assert memory.refusal(message) == expected


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('topology, sentence', [
    ('v5x:2x2', "there is no chip 'v5x'. Known: v4, v5e, v5p, v6e, h100"),
    ('v5e', 'v5e: must be followed by its sides, e.g. v5e:16x16'),
    ('h100:8', '' if topologies.missing('h100') else 'for GPUs give hosts x GPUs per host'),
    ('v5e:3x5', '' if topologies.missing('v5e') else 'is not a valid shape'),
])
def test_an_unknown_topology_is_refused_in_a_sentence(topology, sentence):
  with pytest.raises(ConfigError, match='--topology=' + topology) as error:
    topologies.load(topology)
  assert sentence in str(error.value)


def test_stages_say_that_they_are_alive(monkeypatch):
  lines = []
  monkeypatch.setattr(plan_lib, '_TICK', 0.01)
  stage = plan_lib.Stages(0., lines.append)
  with stage('thinking'):
    while len(lines) < 3:
      pass
  assert 'thinking' in lines[0] and '... still thinking' in lines[1]


@pytest.mark.parametrize('topology', ['v5e:2x4', 'h100:2x4'])
def test_a_plan_in_a_compile_for(topology, tmp_path):
  if lack := topologies.missing(topology):
    pytest.skip(f'needs {lack}')
  lines = []
  found = plan_lib.run(images(), topology, tmp_path, lines.append)
  assert found.memory.fits and found.program.estimate.step > 0
  assert json.loads((tmp_path / 'plan.json').read_text())['fits'] is True
  assert any('compiling it for' in line for line in lines) and lines[-1].endswith('plan.json')


def test_a_step_that_is_refused_in_a_compile_for_tpu_still_gives_a_plan():
  if lack := topologies.missing('v5e'):
    pytest.skip(f'needs {lack}')
  topology = topologies.load('v5e:1x1')
  config = text(model__dim=2048, model__moe__experts__hidden=2**17, model__attention=dict(heads=1, head_dim=8))
  found = ahead_of_time.plan(setup.prepare(config, topology.devices), topology)
  assert found.program is None and not found.memory.fits
  # Two layers of 8 experts of two matrices [2048, 2**17], their gradients and two moments.
  assert found.memory.total >= 4 * 4 * 2 * 8 * 2 * 2048 * 2**17
  assert 'experts with their gradients and optimizer state' in found.advice


def test_a_compile_for_tpu_that_cannot_be_read_back_is_read_as_its_compiler_printed_it(monkeypatch):
  if lack := topologies.missing('v5e'):
    pytest.skip(f'needs {lack}')
  topology = topologies.load('v5e:2x4')
  plan = lambda: ahead_of_time.plan(setup.prepare(images(), topology.devices), topology).program
  read = plan()

  def unreadable(compiled):
    raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands')
  monkeypatch.setattr(jax.stages.Compiled, 'as_text', unreadable)
  assert plan() == read
