"""docs/add_a_router.md works as it stands: its code is run from its text, as a user's files and stage by stage."""
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runner import ROOT
from moejax import functional
from moejax.config import Registry
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import token_plan
from moejax.routing.stages import Routed, noiseless

BLOCKS = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/add_a_router.md').read_text(), re.S)
# `"""Nearest: ...`: a file of moejax/routing/papers/.
ROUTERS = {re.match(r'"""(\w+):', block)[1].lower(): block for block in BLOCKS if "\n@paper('Unpublished'" in block}
CONFIG, TEST = (next(block for block in BLOCKS if sign in block) for sign in ('def get_config', '\ndef test_'))
LINE = next(block for block in BLOCKS if block.startswith('from moejax.routing.papers.nearest import nearest'))
PUBLISHED, ROW = (next(block for block in BLOCKS if block.startswith(sign) and 'def ' not in block)
                  for sign in ('@paper', '"""Nearest centre on'))
STAGES = dict(bigram='features', nearest='score', threshold='select', tempered='weigh', latest='place', floor='balance')


def test_each_of_the_six_stages_is_written_once():
  assert set(ROUTERS) == set(STAGES)


# ---- as a user ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A copy of the checkout with the page's files, and what runs a command in it."""
  folder = tmp_path_factory.mktemp('checkout')
  for name in ('moejax', 'configs', 'tests', 'experiments', 'docs'):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.png'))
  for name in ('pyproject.toml', 'README.md', 'CONTRIBUTING.md'):
    shutil.copy(ROOT / name, folder)
  for name, text in ROUTERS.items():
    (folder / f'moejax/routing/papers/{name}.py').write_text(text)
    with open(folder / 'moejax/routing/papers/__init__.py', 'a') as registry:
      registry.write(LINE.replace('nearest', name))
  (folder / 'configs/nearest_digits.py').write_text(CONFIG)
  (folder / 'tests/routing/papers/test_nearest.py').write_text(TEST)
  run = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(folder)})
  return folder, run


def passed(run, *arguments):
  """How many tests pass, of which all must."""
  done = run([sys.executable, '-m', 'pytest', '-n0', '-q', '-p', 'no:cacheprovider', *arguments])
  assert done.returncode == 0, done.stdout[-3000:]
  return int(re.search(r'(\d+) passed', done.stdout)[1])


@pytest.mark.slow
def test_an_unpublished_router_costs_a_file_and_a_config_and_passes_every_test_that_finds_it(checkout):
  _, run = checkout
  # One test of its own, every contract of every router, and the config: documented, traced, described.
  assert passed(run, '-k', 'nearest', 'tests/routing', 'tests/test_configs.py', 'tests/test_describe.py') >= 17
  assert passed(run, 'tests/test_systems.py', 'tests/test_docs.py', '-k', 'document or listed') >= 2


@pytest.mark.slow
def test_the_stages_of_the_page_keep_what_every_router_promises(checkout):
  _, run = checkout
  own = ' or '.join(name for name in STAGES if name != 'nearest')
  assert passed(run, '-k', own, 'tests/routing/papers/test_papers.py') >= 5 * 15


@pytest.mark.slow
def test_a_published_one_is_a_row_of_the_table(checkout):
  folder, run = checkout
  published = re.sub(r"@paper\('Unpublished'.*\n", PUBLISHED, ROUTERS['nearest'])
  (folder / 'moejax/routing/papers/nearest.py').write_text(published)
  (folder / 'configs/nearest_digits.py').write_text(ROW + CONFIG.split('"""\n', 2)[-1])
  assert passed(run, '-k', 'nearest', 'tests/routing/papers/test_nearest.py', 'tests/test_configs.py') >= 3
  assert 'Nearest centre\n' in run([sys.executable, '-m', 'moejax.systems']).stdout
  # Its row is in the document once it is made anew.
  assert run([sys.executable, '-m', 'moejax.systems', '--write']).returncode == 0
  assert passed(run, 'tests/test_systems.py')


# ---- stage by stage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def modules(tmp_path_factory):
  """The page's files as modules, known to the registries until the tests are done."""
  folder = tmp_path_factory.mktemp('papers')
  known = [(registry._constructors, dict(registry._constructors)) for registry in Registry.all]
  known.append((papers.PAPERS, dict(papers.PAPERS)))
  loaded = {}
  for name, text in ROUTERS.items():
    (folder / f'{name}.py').write_text(text)
    spec = importlib.util.spec_from_file_location(f'page_{name}', folder / f'{name}.py')
    loaded[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded[name])
  yield loaded
  for now, before in known:
    now.clear()
    now.update(before)


@pytest.mark.parametrize('name', STAGES)
def test_a_router_with_it_is_built_routes_and_has_gradients(name, modules):
  config = papers.PAPERS[name].fragment(**papers.PAPERS[name].example)
  assert STAGES[name] in config
  model = functional.functionalize(
      lambda rngs: router.build(config, 'config.router', dim=8, num_experts=4, rngs=rngs))
  params, state = model.init(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 6, 8))
  inputs = RouterInputs(documents=jnp.zeros((2, 6), jnp.int32), valid=jnp.ones((2, 6), bool).at[1, 4:].set(False))

  def loss(params):
    out = model.apply(params, state, x, inputs, train=True)
    return jnp.sum(out.plan.to_dense().weight**2) + sum(out.losses.values()), out

  gradients, out = jax.grad(loss, has_aux=True)(params)
  assert not out.plan.kept[1, 4:].any() and out.plan.kept[0].any()
  norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)]
  assert norms and all(np.isfinite(norms)) and min(norms) > 0


def logits_of(*probs):
  return jnp.log(jnp.array([probs]))


def test_bigram_puts_the_token_before_beside_the_token_and_stays_in_its_document(modules):
  bigram = modules['bigram'].Bigram(dim=1)
  x = jnp.array([[[1.], [2.], [3.]]])
  seen = bigram(x, RouterInputs(documents=jnp.array([[0, 0, 1]])))
  assert seen.tolist() == [[[1., 0.], [2., 1.], [3., 0.]]] and seen.shape[-1] == bigram.width


def test_threshold_keeps_the_first_choice_and_others_that_are_wanted_enough(modules):
  select = modules['threshold'].Threshold(num_experts=3, k=2, least=0.25)
  plan = select(noiseless(logits_of([.6, .3, .1], [.1, .8, .1])), jnp.ones((1, 2), bool), key=None, train=True)
  assert plan.expert.tolist() == [[[0, 1], [1, 0]]]
  assert plan.kept.tolist() == [[[True, True], [True, False]]]


def test_tempered_weights_are_powers_of_the_probabilities(modules):
  logits = logits_of([.64, .36])
  weigh = modules['tempered'].Tempered(temperature=2.)
  plan = weigh.weigh(token_plan(jnp.array([[[1]]]), jnp.ones((1, 1, 1), bool), 2), logits)
  assert float(plan.weight[0, 0, 0]) == pytest.approx(.6 / (.8 + .6), rel=1e-5)  # square roots


def test_latest_keeps_the_last_tokens_of_an_expert(modules):
  place = modules['latest'].Latest(num_experts=2, k=1, slots=2)
  plan = place(token_plan(jnp.array([[[0], [0], [1], [0]]]), jnp.ones((1, 4, 1), bool), 2), None, key=None, train=True)
  assert plan.kept[0, :, 0].tolist() == [False, True, True, True]
  assert plan.slot[0, 1:, 0].tolist() == [1, 0, 0] and plan.capacity == 2


def test_floor_counts_what_experts_lack(modules):
  balance = modules['floor'].Floor(num_experts=4, coefficient=1., least=.8)  # a floor of 0.2
  probs = jnp.array([[[.7, .1, .1, .1], [.5, .3, .1, .1]]])  # means .6, .2, .1, .1
  routed = Routed(scores=None, probs=probs, plan=None, valid=jnp.ones((1, 2), bool))
  assert float(balance.loss(routed)) == pytest.approx(.2)


def test_nearest_is_minus_half_the_squared_distance(modules):
  score = modules['nearest'].Nearest(dim=2, num_experts=2, rngs=nnx.Rngs(0))
  score.centres[...] = jnp.array([[3., 4.], [0., 1.]])
  assert score(jnp.zeros((1, 1, 2)), key=None, train=False).logits.tolist() == [[[-12.5, -0.5]]]
