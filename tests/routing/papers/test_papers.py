"""The contract of every paper's router, in one class that finds new papers by itself."""
import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
import routing_reference as reference

G, S, D, E, V = 2, 12, 8, 4, 11

PAPERS = {name: paper.fragment(**paper.example) for name, paper in papers.PAPERS.items()}


class Routed:
  """A small router of a paper, with compiled functions that the tests share. Evaluation never gets a key."""

  def __init__(self, name):
    def build(rngs):
      return router.build(PAPERS[name], 'config.router', dim=D, num_experts=E, rngs=rngs)
    self.module = build(nnx.Rngs(0))
    self.functional = functional.functionalize(build)
    self.params, self.state = self.functional.init(jax.random.key(0))
    # Kernels of size 0.02 or 0 would make all experts alike; Soft MoE's scale makes its softmaxes sharp.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    self.params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) if leaf.ndim else 5 * leaf,
                               self.params)
    self.train = jax.jit(functools.partial(self.functional.apply, train=True))
    self.eval = jax.jit(functools.partial(self.functional.apply, key=None, train=False))

  def __call__(self, x, ids=None, valid=None, key=0, train=True, params=None, state=None):
    ids = token_ids(0) if ids is None else ids
    inputs = router_inputs(ids, valid)
    trees = (self.params if params is None else params, self.state if state is None else state)
    return self.train(*trees, x, inputs, key=jax.random.key(key)) if train else self.eval(*trees, x, inputs)


routed = functools.lru_cache(Routed)


@functools.cache
def tokens(seed):
  return np.asarray(jax.random.normal(jax.random.key(seed), (G, S, D)))


@functools.cache
def token_ids(seed):
  return np.asarray(jax.random.randint(jax.random.key(seed), (G, S), 0, V))


@jax.jit
def router_inputs(ids, valid=None):
  """Two documents a group, of one task each; the first of images, the second of text."""
  second = jnp.broadcast_to(jnp.arange(S) >= S // 2, ids.shape).astype(jnp.int32)
  row = jnp.arange(ids.shape[0])[:, None]
  starts = jnp.arange(S) % (S // 2) == 0
  return RouterInputs(
      token_ids=ids, previous_ids=jnp.where(starts, 0, jnp.roll(ids, 1, axis=1)),
      next_ids=jnp.roll(ids, -1, axis=1), valid=jnp.ones(ids.shape, bool) if valid is None else valid,
      positions=jnp.broadcast_to(jnp.arange(S) % (S // 2), ids.shape), documents=2 * row + second,
      tasks=(row + second) % 3, modalities=second,
      shared=jax.random.normal(jax.random.key(17), (V, 5))[ids])


def assert_same(one, other, **kwargs):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, **kwargs), one, other)


@pytest.mark.parametrize('name', PAPERS)
class TestEveryPaper:

  @pytest.mark.parametrize('train', [True, False])
  def test_reports_the_metrics_that_all_routers_report(self, name, train):
    out = routed(name)(tokens(1), train=train)
    assert {'load', 'dropped', 'confidence', 'entropy'} <= set(out.metrics)
    assert {f'{loss}_loss' for loss in out.losses} <= set(out.metrics)
    assert set(out.losses) == set(PAPERS[name].get('balance', {})) - {'bias'}
    assert out.metrics['load'].shape == (E,)
    assert float(out.metrics['load'].sum()) == pytest.approx(1, abs=1e-6)
    assert 0 <= out.metrics['dropped'] <= 1
    assert 1 / E <= out.metrics['confidence'] <= 1
    assert 0 <= out.metrics['entropy'] <= np.log(E) + 1e-6
    assert ('experts_per_token' in out.metrics) != hasattr(out.plan, 'dispatch')
    if 'experts_per_token' in out.metrics:
      plan = jax.device_get(out.plan)
      used = plan.kept if hasattr(plan, 'kept') else plan.filled if hasattr(plan, 'filled') else plan.weight > 0
      assert float(out.metrics['experts_per_token']) == pytest.approx(used.sum() / (G * S))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))

  def test_evaluation_needs_no_key_and_repeats(self, name):
    assert_same(routed(name)(tokens(1), train=False), routed(name)(tokens(1), train=False))

  def test_training_with_randomness_depends_on_its_key_alone(self, name):
    one, again, other = (routed(name)(tokens(1), key=key) for key in (1, 1, 2))
    assert_same(one, again)
    differs = [(a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))]
    assert any(differs) == papers.PAPERS[name].draws

  def test_only_training_updates_state_and_every_update_has_its_place(self, name):
    router_of = routed(name)
    assert router_of(tokens(1), train=False).updates == {}
    updates = router_of(tokens(1)).updates
    assert bool(updates) == bool(jax.tree.leaves(router_of.state))
    merged = functional.merge_updates(router_of.state, updates)
    assert jax.tree.structure(merged) == jax.tree.structure(router_of.state)

  @pytest.mark.parametrize('train', [True, False])
  def test_padding_changes_nothing_and_goes_nowhere(self, name, train):
    valid = np.ones((G, S), bool)
    valid[0, 2:5] = valid[1, 7:] = False
    x, ids = tokens(1), token_ids(1)
    other_x = np.where(valid[..., None], x, 100 * tokens(2))
    other_ids = np.where(valid, ids, token_ids(2))
    one, other = (routed(name)(*inputs, valid=valid, train=train) for inputs in ((x, ids), (other_x, other_ids)))
    assert (np.asarray(one.plan.shares())[~valid] == 0).all()
    np.testing.assert_array_equal(reference.outputs(one.plan, x)[valid], reference.outputs(other.plan, other_x)[valid])
    assert_same((one.losses, one.metrics, one.updates), (other.losses, other.metrics, other.updates))

  def test_groups_do_not_see_each_other(self, name):
    x = tokens(1)
    one, other = (routed(name)(batch).plan for batch in (x, np.stack([x[0], tokens(2)[1]])))
    np.testing.assert_array_equal(reference.outputs(one, x)[0], reference.outputs(other, x)[0])

  def test_permuting_the_experts_permutes_the_plan_and_nothing_else(self, name):
    order = np.array([2, 0, 3, 1])
    router_of = routed(name)
    if not papers.PAPERS[name].exchangeable:
      return
    def permuted(leaf):
      for axis in range(leaf.ndim):
        leaf = jnp.take(leaf, order, axis) if leaf.shape[axis] == E else leaf
      return leaf
    params = jax.tree.map(permuted, router_of.params)
    one = router_of(tokens(1), train=False)
    other = router_of(tokens(1), train=False, params=params)
    # Sums over experts in another order: float32 rounding.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(one.plan.shares()[..., order], other.plan.shares())
    close(one.metrics['load'][order], other.metrics['load'])
    for loss in one.losses:
      close(one.losses[loss], other.losses[loss])
    if hasattr(one.plan, 'combine'):
      close(one.plan.combine[:, :, order], other.plan.combine)
      close(one.plan.dispatch[:, :, order], other.plan.dispatch)
    else:
      close(reference.dense_weights(one.plan)[..., order], reference.dense_weights(other.plan))

  @pytest.mark.parametrize('train', [True, False])
  def test_leaks_exactly_what_it_declares(self, name, train):
    router_of = routed(name)
    leak = router_of.module.leak(train)
    changed, half = [], S // 2
    for seed in range(20):
      x, ids = tokens(3 * seed), token_ids(3 * seed)
      later_x = np.concatenate([x[:, :half], tokens(3 * seed + 1)[:, half:]], axis=1)
      later_ids = np.concatenate([ids[:, :half], token_ids(3 * seed + 1)[:, half:]], axis=1)
      one, other = (router_of(*inputs, train=train).plan for inputs in ((x, ids), (later_x, later_ids)))
      assert one.leak == leak
      outputs = [reference.outputs(plan, batch)[:, :half] for plan, batch in ((one, x), (other, later_x))]
      changed.append((outputs[0] != outputs[1]).any())
      if leak == 'slots':  # only whether a choice has a slot may change, not the choice
        np.testing.assert_array_equal(one.expert[:, :half], other.expert[:, :half])
        first_choices = one.kept[:, :half, 0], other.kept[:, :half, 0]
        np.testing.assert_array_equal(*first_choices)
    assert any(changed) == (leak != 'causal')

  def test_routes_in_float32_for_any_dtype_of_the_activations(self, name):
    router_of = routed(name)
    # Padding would be blanked before anything is computed, in the type of the activations.
    inputs = dataclasses.replace(router_inputs(token_ids(0)), valid=None)
    program = jax.make_jaxpr(functools.partial(router_of.functional.apply, train=True))(
        router_of.params, router_of.state, tokens(1).astype(jnp.bfloat16), inputs, key=jax.random.key(0))
    # Every variable is printed with its type where it is bound: the activations are the only one in bfloat16.
    assert len(re.findall(r':bf16\[', str(program))) == 1
    assert not any(variable.aval.dtype == jnp.bfloat16 for variable in program.jaxpr.outvars)

  @pytest.mark.parametrize('train', [True, False])
  def test_slots_are_unique_and_within_capacity(self, name, train):
    plan = routed(name)(tokens(1), train=train).plan
    if hasattr(plan, 'filled'):
      for g, e in np.ndindex(G, E):
        taken = np.asarray(plan.token[g, e])[np.asarray(plan.filled[g, e])]
        assert len(set(taken)) == len(taken) == plan.capacity
    if getattr(plan, 'slot', None) is not None:
      kept = np.asarray(plan.kept)
      assert (np.asarray(plan.slot)[kept] < plan.capacity).all() and (np.asarray(plan.slot)[kept] >= 0).all()
      taken = list(zip(np.nonzero(kept)[0], np.asarray(plan.expert)[kept], np.asarray(plan.slot)[kept]))
      assert len(set(taken)) == len(taken)
      assert not kept.all()  # the tests of this class would prove little if nothing were dropped

  def test_gradients_equal_finite_differences(self, name):
    router_of = routed(name)
    if not jax.tree.leaves(router_of.params):
      return
    x, inputs = tokens(1), router_inputs(token_ids(0))
    towards = jax.random.normal(jax.random.key(7), (G, S, E))
    along = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(8), leaf.shape), router_of.params)
    def value(t):
      params = jax.tree.map(lambda leaf, direction: leaf + t * direction, router_of.params, along)
      out = router_of.functional.apply(params, router_of.state, x, inputs, key=jax.random.key(0), train=True)
      dense = out.plan.to_dense().weight if hasattr(out.plan, 'to_dense') else out.plan.shares()
      return jnp.mean(dense * towards) + sum(out.losses.values())
    value_and_slope = jax.jit(jax.value_and_grad(value))
    step = 1e-3  # no choice changes; float32 differences are good to about 1e-7/1e-3
    (above, _), (below, _), (_, slope) = (value_and_slope(t) for t in (step, -step, 0.))
    assert abs(slope) > 1e-3
    assert float(slope) == pytest.approx(float(above - below) / (2 * step), abs=3e-4)


ALONE = {name: paper.fragment(**paper.alone) for name, paper in papers.PAPERS.items() if paper.alone is not None}


# Whose formulas give no slot to an expert of four where there is one token.
NO_SLOTS = {'fastmoe', 'glam'}


@pytest.mark.parametrize('name, num_experts, num_tokens', [*((name, 1, 5) for name in ALONE),
                                                           *((name, E, 1) for name in PAPERS if name not in NO_SLOTS)])
def test_one_expert_and_one_token_are_not_special_cases(name, num_experts, num_tokens):
  config = ALONE[name] if num_experts == 1 else PAPERS[name]
  apply = functional.functionalize(
      lambda rngs: router.build(config, 'config.router', dim=D, num_experts=num_experts, rngs=rngs))
  draw = np.random.default_rng(1)  # to initialise takes longer than to route
  params = jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) if leaf.ndim else 1), apply.shapes()[0])
  state = jax.jit(lambda key: apply.init(key)[1])(jax.random.key(0))
  x = draw.normal(size=(1, num_tokens, D)).astype(np.float32)
  inputs = jax.tree.map(lambda a: a[:1, :num_tokens], router_inputs(jnp.zeros((G, S), jnp.int32)))
  out = jax.jit(functools.partial(apply.apply, train=True))(params, state, x, inputs, key=jax.random.key(2))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out.losses, out.metrics, out.plan.shares())))
  assert out.metrics['dropped'] == 0
  if num_experts == 1:
    np.testing.assert_allclose(out.plan.shares(), np.ones((1, num_tokens, 1)), rtol=1e-6)
    np.testing.assert_array_equal(out.metrics['load'], [1])


@pytest.mark.parametrize('name', PAPERS)
def test_who_chooses_whom_shows_in_the_plan(name):
  shares = np.asarray(routed(name)(tokens(1)).plan.shares())
  chooses, (by_token, by_expert) = papers.PAPERS[name].chooses, (shares.sum(2), shares.sum(1))
  if chooses == 'token':
    assert by_token.max() <= routed(name).module.select.k
  if chooses == 'expert':
    assert (by_expert == by_expert[0, 0]).all() and by_token.min() < by_token.max()
  if chooses == 'together':
    choices = PAPERS[name]['select'].get('k', 1)
    share = S * choices // E
    assert (by_expert <= share).all() and (by_token <= choices).all()
    if PAPERS[name]['place']['name'] == 'dropless':  # by construction, not by dropping what is too much
      assert (by_expert == share).all() and (by_token == choices).all()
  if chooses in ('fixed', 'chance'):
    other = np.asarray(routed(name)(tokens(2)).plan.shares())
    np.testing.assert_array_equal(shares, other)
  if chooses == 'soft':
    assert (shares > 0).all() or not (shares == shares.round()).all()
