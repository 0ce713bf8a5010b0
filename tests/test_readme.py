"""The README's instructions for adding a routing paper work as they stand: its code is run from its text."""
import re
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.runner import ROOT
from moejax.routing import papers, scores
from moejax.training import setup

TEXT = (ROOT / 'README.md').read_text()


@pytest.fixture(scope='module')
def blocks():
  section = TEXT.split('## Add a routing paper')[1].split('\n## ')[0]
  return [textwrap.dedent(block) for block in re.findall(r'```python\n(.*?)\n *```', section, re.S)]


def test_a_new_paper_costs_a_stage_a_fragment_a_config_and_a_test(blocks, monkeypatch):
  stage, fragment, config, test = blocks
  monkeypatch.setattr(scores.SCORES, '_constructors', dict(scores.SCORES._constructors))
  exec(stage, dict(vars(scores)))
  namespace = {}
  exec(fragment, namespace)
  monkeypatch.setattr(papers, 'x_moe', namespace['x_moe'], raising=False)

  exec(config, namespace)
  built = setup.prepare(namespace['get_config']())
  assert built.config.model.moe.router.score.name == 'cosine'

  names = dict(SCORES=scores.SCORES, jax=jax, np=np, nnx=nnx)
  exec(test, names)
  names['test_cosine_logits_do_not_depend_on_the_length_of_a_token']()


def test_the_router_that_the_readme_spells_out_is_the_papers():
  spelled = {}
  block = next(block for block in re.findall(r'```python\n(.*?)```', TEXT, re.S) if block.startswith('router = '))
  exec(block, spelled)
  assert spelled['router'] == {key: value for key, value in strip_none(papers.vmoe(k=2)).items()}


def strip_none(fragment):
  return {key: strip_none(value) if isinstance(value, dict) else value for key, value in fragment.items()
          if value is not None}


def test_every_config_that_the_readme_lists_exists_and_all_are_listed():
  table = TEXT.split('| config | paper |')[1].split('\n\n')[0]
  listed = set(re.findall(r'`(\w+)`', table))
  assert listed == {path.stem for path in (ROOT / 'configs').glob('*.py')}
