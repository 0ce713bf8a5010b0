"""Routing groups that do not divide over the devices: found on meshes of pods, and reported by plans and training."""
import dataclasses

import jax
import pytest

from configs import expert_choice_c4, st_moe_c4, switch_c4
from moejax.config_files import override
from moejax.routing import papers
from moejax.training import loop, spanning_groups, workdir
from moejax.training import setup as setup_lib
from moejax.training.setup import default_config
from moejax.training.spanning_groups import Spanning


def decoder(group, router=None, dispatch='einsum', accumulate=1):
  """A sparse decoder whose batch is 32 sequences of 8 tokens: 32 tokens a device, of 8."""
  config = default_config()
  config.model = dict(
      name='decoder', vocab_size=258, dim=8, num_layers=1, attention=dict(heads=2), feed_forward=dict(hidden=8),
      sparse=dict(name='every', n=1),
      moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=8), group=group,
               router=router or papers.switch(capacity_factor=1.), dispatch=dict(name=dispatch)))
  config.objective = dict(name='language_model')
  config.data = dict(name='language_model', source=dict(name='chitchat'), tokenizer=dict(name='bytes'), length=8,
                     batch_size=32)
  config.training.accumulate = accumulate
  return config


DROPLESS = dict(router=papers.top_k_dropless(k=2), dispatch='grouped')


@pytest.mark.parametrize('config, expected', [
    (dict(group=32), None),
    (dict(group='sequence'), None),
    # 4 groups of 64: each is what two devices have.
    (dict(group=64), Spanning(4, 64, 32, 64)),
    (dict(group=64, dispatch='gather'), Spanning(4, 64, 32, 64)),
    (dict(group='batch'), Spanning(1, 256, 32, 'batch')),
    # A microbatch is 16 tokens a device.
    (dict(group=32, accumulate=2), Spanning(4, 32, 16, 32)),
    # Rows that travel by themselves need no groups, unless a device has parts of several.
    (dict(group=64, **DROPLESS), None),
    (dict(group='batch', **DROPLESS), None),
])
def test_groups_that_do_not_divide_are_found(config, expected):
  setup = setup_lib.prepare(decoder(**config), jax.devices())
  assert spanning_groups.spanning(setup) == ({} if expected is None else {'model.moe': expected})


@pytest.mark.parametrize('module, variant, chips, group', [
    (switch_c4, 'base', 256, 912), (switch_c4, 'c', 512, 456), (st_moe_c4, '32b', 256, 912),
    (expert_choice_c4, 'base', 256, 912)])
def test_the_groups_of_published_models_divide_over_their_pods(module, variant, chips, group, monkeypatch):
  """2048 examples of 114 target tokens: 8 a chip of 256, 4 of 512."""
  setup = published(module, variant, monkeypatch)
  assert setup.config.model.decoder.moe.group == group
  assert spanning_groups.spanning(setup, shards=chips) == {}


def test_the_decoders_57_groups_of_4096_do_not_divide(monkeypatch):
  setup = published(switch_c4, 'base', monkeypatch)
  wide = dataclasses.replace(setup, config=override(setup.config, {'model.decoder.moe.group': 4096}))
  assert spanning_groups.spanning(wide, shards=256) == {'model.decoder.moe': Spanning(57, 4096, 912, 4096)}


def published(module, variant, monkeypatch):
  monkeypatch.setattr(setup_lib, '_trace', lambda setup: None)
  config = module.get_config(variant)
  config.evaluation.evaluators = {}
  return setup_lib.prepare(config, jax.devices()[:1])


def test_one_device_has_all_groups():
  assert spanning_groups.spanning(setup_lib.prepare(decoder('batch'), jax.devices()[:1])) == {}


def test_the_notice_names_a_group_that_divides():
  setup = setup_lib.prepare(decoder(64), jax.devices())
  notice = spanning_groups.notice(setup)
  assert 'the 4 routing groups of 64 tokens in config.model.moe do not divide evenly over the 8 shards' in notice
  assert '--config.model.moe.group=32 ' in notice
  assert spanning_groups.notice(setup_lib.prepare(decoder(32), jax.devices())) is None


def test_training_says_it(monkeypatch, tmp_path):
  monkeypatch.setattr(loop, 'train', lambda setup, folder, say, write_report, near: None)
  monkeypatch.setattr(workdir, 'claim', lambda folder, config: [])
  said = []
  loop.run(decoder(64), tmp_path, said.append)
  loop.run(decoder(32), tmp_path, said.append)
  assert [line[:26] for line in said if 'groups' in line] == ['Slow: the 4 routing groups']
