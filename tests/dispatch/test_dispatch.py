"""All dispatchers execute a plan alike: outputs and gradients equal a float64 loop over tokens, written out below.

The loop's backward pass is derived by hand for experts with one ReLU:
  z = x Wi, f = relu(z) Wo, y = sum w f   =>   dw = dy.f, df = w dy, dWo = relu(z) df', dz = (Wo df) [z > 0], ...
"""
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from moejax import dispatch, experts, functional
from moejax.config import ConfigError
from moejax.routing.plans import DensePlan, SlotPlan, SoftPlan, TokenPlan

G, S, K, E, C, D, F = 2, 5, 2, 4, 3, 4, 6

DISPATCHERS = {
    'reference': dict(name='reference'),
    'einsum': dict(name='einsum'),
    'gather': dict(name='gather'),
    'grouped': dict(name='grouped'),
    'grouped by ragged_dot': dict(name='grouped', implementation='ragged_dot'),
}
RUNS = {  # which can run what
    'dropless': ['reference', 'grouped', 'grouped by ragged_dot'],
    'placed': list(DISPATCHERS),
    'slots': list(DISPATCHERS),
    'soft': ['reference', 'einsum'],
    'dense': ['reference'],
}
CASES = [(kind, name) for kind, names in RUNS.items() for name in names if kind == 'dropless' or ' ' not in name]


@functools.cache
def build_experts(dtype=jnp.float32, **config):
  config = dict(name='feed_forward', hidden=F, activation='relu') | config
  return functional.functionalize(
      lambda rngs: experts.build(config, 'experts', dim=D, num_experts=E, dtype=dtype, rngs=rngs))


def call_experts(params, dtype=jnp.float32, **config):
  apply = build_experts(dtype, **config).apply
  call = lambda rows, layout, **kwargs: apply(params, {}, rows, layout, **kwargs)
  call.block = lambda train: None  # only dispatchers' own sums are tested: never fused
  return call


# Plans. Weights are random and what is drawn is who goes where: any experts, twice the same too, any choices dropped.


def token_plan(expert, kept, seed=0):
  rng = np.random.RandomState(seed)
  return TokenPlan(expert=jnp.array(expert), weight=jnp.array(rng.rand(*expert.shape), jnp.float32), kept=jnp.array(kept),
                   passthrough=jnp.array(rng.randn(G, S), jnp.float32), num_experts=E)


def placed_plan(expert, kept):
  slot, taken = np.full(expert.shape, -1), np.zeros((G, E), int)
  kept = kept.copy()
  for g, s, k in np.ndindex(expert.shape):
    if kept[g, s, k]:
      slot[g, s, k] = taken[g, expert[g, s, k]]
      taken[g, expert[g, s, k]] += 1
      kept[g, s, k] = slot[g, s, k] < C
  return dataclasses.replace(token_plan(expert, kept), slot=jnp.array(np.where(kept, slot, 99)), capacity=C)


def slot_plan(token, filled):
  rng = np.random.RandomState(0)
  return SlotPlan(token=jnp.array(token), weight=jnp.array(rng.rand(G, E, C), jnp.float32), filled=jnp.array(filled),
                  passthrough=jnp.array(rng.randn(G, S), jnp.float32), num_tokens=S)


def soft_plan():
  logits = np.random.RandomState(0).randn(G, S, E, C)
  return SoftPlan(dispatch=jax.nn.softmax(jnp.array(logits, jnp.float32), axis=1),
                  combine=jax.nn.softmax(jnp.array(logits, jnp.float32), axis=(2, 3)))


def choices(high, *shape):
  return arrays(np.int32, shape, elements=st.integers(0, high - 1))


def any_plan(kind):
  """Strategy for plans of one kind; static shapes, so one compilation serves all."""
  if kind in ('dropless', 'placed'):
    plan = token_plan if kind == 'dropless' else placed_plan
    return st.builds(plan, choices(E, G, S, K), arrays(bool, (G, S, K)))
  if kind == 'slots':
    return st.builds(slot_plan, choices(S, G, E, C), arrays(bool, (G, E, C)))
  if kind == 'soft':
    return st.builds(soft_plan)
  return st.builds(lambda w: DensePlan(jnp.array(w, jnp.float32)), choices(3, G, S, E))


def soft_arrays(plan):
  """Dispatch and combine tensors of any plan with slots, in float64 and by loops."""
  if isinstance(plan, SoftPlan):
    return np.asarray(plan.dispatch, np.float64), np.asarray(plan.combine, np.float64)
  dispatch_, combine = np.zeros((2, G, S, E, C))
  for g, e, c in np.ndindex(G, E, C):
    if plan.filled[g, e, c]:
      dispatch_[g, plan.token[g, e, c], e, c] = 1
      combine[g, plan.token[g, e, c], e, c] = plan.weight[g, e, c]
  return dispatch_, combine


# The oracle.


def expert_loop(x, wi, wo, dy):
  """One row through one expert: output, and a function from a weight to the gradients."""
  z = x @ wi
  h = np.maximum(z, 0)

  def pull(weight):
    df = weight * dy
    dz = (wo @ df) * (z > 0)
    return wi @ dz, np.outer(x, dz), np.outer(h, df)
  return h @ wo, pull


def loop(plan, x, wi, wo, dy):
  """y, dx, dwi, dwo and the gradient of `plan.weight` (absent for soft plans), one token and expert at a time."""
  x, wi, wo, dy = (np.asarray(a, np.float64) for a in (x, wi, wo, dy))
  y, dx, dwi, dwo = np.zeros_like(x), np.zeros_like(x), np.zeros_like(wi), np.zeros_like(wo)
  if isinstance(plan, SoftPlan):
    to_slots, combine = soft_arrays(plan)
    for g, e, c in np.ndindex(G, E, C):
      row = to_slots[g, :, e, c] @ x[g]
      f, pull = expert_loop(row, wi[e], wo[e], combine[g, :, e, c] @ dy[g])
      drow, di, do = pull(1.)
      y[g] += np.outer(combine[g, :, e, c], f)
      dx[g] += np.outer(to_slots[g, :, e, c], drow)
      dwi[e] += di
      dwo[e] += do
    return y, dx, dwi, dwo, None
  dweight = np.zeros(plan.weight.shape)
  for index in np.ndindex(plan.weight.shape):
    if isinstance(plan, TokenPlan):
      (g, s, _), e, kept = index, int(plan.expert[index]), plan.kept[index]
    elif isinstance(plan, SlotPlan):
      (g, e, _), s, kept = index, int(plan.token[index]), plan.filled[index]
    else:
      (g, s, e), kept = index, True
    if kept:
      weight = float(plan.weight[index])
      f, pull = expert_loop(x[g, s], wi[e], wo[e], dy[g, s])
      y[g, s] += weight * f
      dweight[index] = dy[g, s] @ f
      for total, part in zip((dx[g, s], dwi[e], dwo[e]), pull(weight)):
        total += part
  if plan.passthrough is not None:
    passthrough = np.asarray(plan.passthrough, np.float64)[..., None]
    y, dx = y + passthrough * x, dx + passthrough * dy
  return y, dx, dwi, dwo, dweight


def draw(dtype=jnp.float32):
  rng = np.random.RandomState(1)
  return [jnp.asarray(rng.randn(*shape), dtype) for shape in [(G, S, D), (E, D, F), (E, F, D), (G, S, D)]]


@functools.cache
def runner(name, dtype=jnp.float32):
  run = dispatch.build(DISPATCHERS[name], 'config.dispatch')

  @jax.jit
  def values_and_gradients(plan, x, wi, wo, dy):
    weight = None if isinstance(plan, SoftPlan) else plan.weight

    def apply(x, wi, wo, weight):
      changed = plan if weight is None else dataclasses.replace(plan, weight=weight)
      return run(changed, x, call_experts(dict(wi=wi, wo=wo), dtype))
    y, pull = jax.vjp(apply, x, wi, wo, weight)
    return y, *pull(dy)
  return values_and_gradients


@pytest.fixture(scope='module', params=CASES, ids=' '.join)
def case(request):
  kind, name = request.param
  return kind, runner(name)


@given(data=st.data())
def test_values_and_gradients_equal_the_loop_over_tokens(case, data):
  kind, run = case
  plan, arguments = data.draw(any_plan(kind)), draw()
  for got, expected in zip(run(plan, *arguments), loop(plan, *arguments)):
    if expected is not None:
      # Sums of at most G*S*K=20 float32 terms below 100 (a product of four normals).
      np.testing.assert_allclose(got, expected, rtol=0, atol=20 * 100 * 2**-24)


@pytest.mark.parametrize('name', ['gather', 'grouped'])
def test_many_choices_are_a_loop_and_equal_the_loop_over_tokens(name):
  """If a token may choose all experts, a program unrolled over choices would be endless."""
  rng = np.random.RandomState(0)
  plan, arguments = placed_plan(rng.randint(E, size=(G, S, 40)), rng.rand(G, S, 40) < 0.5), draw()
  for got, expected in zip(runner(name)(plan, *arguments), loop(plan, *arguments)):
    # Sums of at most G*S*40=400 float32 terms below 100 (a product of four normals).
    np.testing.assert_allclose(got, expected, rtol=0, atol=400 * 100 * 2**-24)
  sizes = [len(list(equations(jax.make_jaxpr(runner(name))(placed_plan(expert, expert >= 0), *arguments).jaxpr)))
           for expert in (np.zeros((G, S, 80), int), np.zeros((G, S, 160), int))]
  assert sizes[0] == sizes[1]


@pytest.mark.parametrize('name', DISPATCHERS)
@pytest.mark.parametrize('expert', [np.zeros((G, S, K), int), np.full((G, S, K), E - 1)], ids=['first', 'last'])
def test_one_expert_may_take_all_and_others_get_zero_gradients(name, expert):
  plan, arguments = placed_plan(expert, np.ones((G, S, K), bool)), draw()
  _, _, dwi, dwo, _ = runner(name)(plan, *arguments)
  others = np.arange(E) != expert[0, 0, 0]
  assert not dwi[others].any() and not dwo[others].any()
  assert dwi[~others].any() and dwo[~others].any()


@pytest.mark.parametrize('name', DISPATCHERS)
def test_bfloat16_differs_by_its_roundings_only(name):
  rng = np.random.RandomState(0)
  plan = placed_plan(rng.randint(E, size=(G, S, K)), np.ones((G, S, K), bool))
  x, wi, wo, dy = draw(jnp.bfloat16)
  y = runner(name, jnp.bfloat16)(plan, x, wi, wo, dy)[0]
  assert y.dtype == jnp.bfloat16
  expected, magnitude = loop(plan, x, wi, wo, x)[0], loop(plan, abs(x), abs(wi), abs(wo), x)[0]
  # Rounded are z (whence relu), f, the weight (einsum) and y: four times at most 2^-8 of the sum of magnitudes.
  bound = 4 * 2**-8 * (abs(magnitude) + 2 * abs(np.asarray(plan.passthrough)[..., None] * np.asarray(x, np.float64)))
  assert (abs(np.asarray(y, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize('kind', ['placed', 'slots'])
def test_the_same_dropout_masks_under_every_dispatcher(kind):
  rng = np.random.RandomState(0)
  if kind == 'placed':
    plan = placed_plan(rng.randint(E, size=(G, S, K)), rng.rand(G, S, K) < 0.8)
  else:
    plan = slot_plan(np.argsort(rng.rand(G, E, S))[..., :C], rng.rand(G, E, C) < 0.8)
  x, wi, wo, _ = draw()

  def run(name, train=True):
    call = dispatch.build(DISPATCHERS[name], 'config.dispatch')
    layer = call_experts(dict(wi=wi, wo=wo), dropout=0.5)
    return jax.jit(lambda plan, x: call(plan, x, layer, key=jax.random.key(3), train=train))(plan, x)
  expected = run('reference')
  assert abs(expected - run('reference', train=False)).max() > 0.1
  for name in ('einsum', 'gather', 'grouped'):
    np.testing.assert_allclose(run(name), expected, rtol=0, atol=20 * 100 * 2**-24)


def test_mixed_slots_draw_the_same_dropout_masks_under_every_dispatcher():
  x, wi, wo, _ = draw()
  y = [dispatch.build(DISPATCHERS[name], 'd')(soft_plan(), x, call_experts(dict(wi=wi, wo=wo), dropout=0.5),
                                             key=jax.random.key(3), train=True) for name in RUNS['soft']]
  np.testing.assert_allclose(*y, rtol=0, atol=20 * 100 * 2**-24)


def test_gather_and_grouped_scatter_no_rows_of_a_token_plan_forwards_or_backwards():
  """The inverse of each permutation is known, so gradients of reads are reads; only indices are scattered."""
  plan = placed_plan(np.random.RandomState(0).randint(E, size=(G, S, K)), np.ones((G, S, K), bool))
  arguments = draw()
  for name in ('gather', 'grouped'):
    jaxpr = jax.make_jaxpr(runner(name))(plan, *arguments)
    scattered = [eqn.outvars[0].aval for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name.startswith('scatter')]
    assert scattered and all(jnp.issubdtype(aval.dtype, jnp.integer) for aval in scattered), (name, scattered)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


@pytest.mark.parametrize('kind, able', RUNS.items())
def test_an_unsupported_plan_is_refused_naming_the_dispatchers_that_can_run_it(kind, able):
  zeros = np.zeros((G, S, K), int)
  plan = {'dropless': token_plan(zeros, zeros == 0), 'placed': placed_plan(zeros, zeros == 0),
          'slots': slot_plan(np.zeros((G, E, C), int), np.ones((G, E, C), bool)), 'soft': soft_plan(),
          'dense': DensePlan(jnp.zeros((G, S, E)))}[kind]
  x, wi, wo, _ = draw()
  for name in set(DISPATCHERS) - set(able):
    run = dispatch.build(DISPATCHERS[name], 'config.model.moe.dispatch')
    with pytest.raises(ConfigError) as error:
      jax.eval_shape(lambda x: run(plan, x, call_experts(dict(wi=wi, wo=wo))), x)
    message = str(error.value)
    assert 'config.model.moe.dispatch' in message and type(plan).__name__ in message
    assert repr(DISPATCHERS[name]['name']) in message and all(repr(n) in message for n in able if ' ' not in n)


def test_supports_is_known_without_a_plan():
  assert dispatch.Grouped.supports(TokenPlan, placed=False) and not dispatch.Gather.supports(TokenPlan, placed=False)
  assert dispatch.Gather.supports(TokenPlan, placed=True) and not dispatch.Gather.supports(SoftPlan, placed=True)


@pytest.mark.parametrize('implementation, sentence', [
    ('pallas_tpu', "'pallas_tpu' runs on TPU, not on cpu: use 'xla'"), ('pallas_gpu', 'NVIDIA GPUs.* use xla'),
    ('tokamax', 'tokamax is not installed.* or use ragged_dot')])
def test_an_implementation_that_does_not_run_here_is_refused_while_tracing(implementation, sentence, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokamax', None)
  zeros = np.zeros((G, S, K), int)
  x, wi, wo, _ = draw()
  run = dispatch.build(dict(name='grouped', implementation=implementation), 'config.model.moe.dispatch')
  with pytest.raises(ConfigError, match=f'^config.model.moe.dispatch.implementation: .*{sentence}'):
    jax.eval_shape(lambda x: run(token_plan(zeros, zeros == 0), x, call_experts(dict(wi=wi, wo=wo))), x)


def test_a_misspelt_implementation_is_refused_when_built():
  with pytest.raises(ConfigError, match='config.dispatch.implementation must be one of'):
    dispatch.build(dict(name='grouped', implementation='xlaa'), 'config.dispatch')
