"""What a person gets wrong in the shipped configs is answered in a sentence, before anything is compiled.

Each case is a whole config with one mistake in it; what the parts say by themselves is tested with the parts.
"""
import importlib

import pytest

from moejax.config import ConfigError
from moejax.data import DataError
from moejax.routing import papers
from moejax.training import setup

MISTAKES = {
    'a misspelt key of a router stage': (
        'vmoe_digits', {'model.moe.router.select.kk': 2}, "config.model.moe.router.select.kk: TopK has no such key."),
    'a misspelt stage': (
        'vmoe_digits', {'model.moe.router.select.name': 'topk'}, "there is no router selection 'topk'. Did you mean 'top_k'?"),
    'text for a number': (
        'vmoe_digits', {'model.moe.num_experts': 'eight'}, 'config.model.moe.num_experts must be an int'),
    'more choices than experts': (
        'vmoe_digits', {'model.moe.router.select.k': 9}, 'config.model.moe.router.select: a token cannot choose 9 of 8 experts'),
    'experts that the mesh cannot share': (
        'vmoe_digits', {'model.moe.num_experts': 6, 'mesh.expert': 4}, 'make it a multiple of 4'),
    'a capacity that keeps nothing': (
        'vmoe_digits', {'model.moe.router.place.capacity_factor': 0.},
        'config.model.moe.router.place.capacity_factor must be a float above 0, not 0.0.'),
    'a decoder whose experts choose': (
        'switch_chitchat', {'model.moe.router': papers.expert_choice()}, 'config.model'),
    'a decoder with batch priority': (
        'switch_chitchat', {'model.moe.router.place.priority': 'batch'}, 'config.model'),
    'a decoder whose tokens compete for slots, unasked': (
        'gshard_chitchat', {'model.routing_leak': 'refuse'}, "'slots'"),
    'a plan that the dispatcher cannot run': (
        'soft_moe_digits', {'model.moe.dispatch.name': 'grouped'},
        "config.model.moe.dispatch: dispatcher 'grouped' cannot run a SoftPlan; 'einsum' and 'reference' can."),
    'a dropless router without buffers': (
        'mixtral_chitchat', {'model.moe.dispatch.name': 'gather'}, "cannot run a TokenPlan without a capacity"),
    'ids beyond the vocabulary': (
        'switch_chitchat', {'model.vocab_size': 256}, 'config.model.vocab_size is 256'),
    'images of another size': (
        'vmoe_digits', {'data.image_size': 16}, 'config.model.image_size is 8, but config.data.image_size is 16'),
    'a model that reads other tokens than there are': (
        'switch_chitchat', {'model': importlib.import_module('configs.t5_chitchat').get_config().model},
        "config.model: the model needs 'encoder_tokens', but batches of config.data have 'loss_mask', 'positions', "),
    'groups that do not divide': (
        'vmoe_digits', {'model.moe.group': 0}, 'config.model.moe.group'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_it_is_refused_in_a_sentence_that_names_the_key(mistake):
  name, changes, sentence = MISTAKES[mistake]
  with pytest.raises(ConfigError) as error:
    setup.prepare(changed(name, changes))
  assert sentence in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('content, sentence', [(None, 'corpus.txt'), (b'\x1f\x8b broken', 'corpus.txt')])
def test_a_file_that_is_missing_or_broken_is_named_before_anything_is_compiled(content, sentence, tmp_path):
  path = tmp_path / ('corpus.txt' if content is None else 'corpus.txt.gz')
  if content is not None:
    path.write_bytes(content)
  built = setup.prepare(changed('dense_chitchat', {'data.source': dict(name='text', files=dict(train=str(path)))}))
  with pytest.raises(DataError, match=sentence):
    next(iter(built.pipeline.train(0)))


def changed(name, changes):
  config = importlib.import_module(f'configs.{name}').get_config()
  with config.unlocked(), config.ignore_type():
    config.evaluation.evaluators = {}
    config.checkpoint.metric = None
    for path, value in changes.items():
      *parents, key = path.split('.')
      node = config
      for parent in parents:
        node = node[parent]
      node[key] = value
  return config
