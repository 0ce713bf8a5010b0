"""Which implementation of attention is chosen, what it says of itself, and that fused ones hold no square of logits."""
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh as Devices

from moejax.kernels.choice import CannotRun
from moejax.kernels.target import interpreted
from moejax.layers.attend import Mask, attend, choice, explain
from moejax.layers.attend.inputs import AttentionInputs
from moejax.parallel import rules
from moejax.planning import topologies
from tests import checked_shapes

KINDS = {'tpu': 'TPU v5 lite', 'gpu': 'NVIDIA H100 80GB HBM3', 'cpu': 'cpu'}
B, H, N = 2, 8, 4


def on(platform):
  """What is traced inside is for a device that is only described."""
  device = AbstractDevice(device_kind=KINDS[platform], num_cores=1, platform=platform)
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device))


def shapes(S, T=None, width=64, dtype=jnp.bfloat16):
  """Queries, keys and values without values."""
  keys = jax.ShapeDtypeStruct((B, T or S, N, width), dtype)
  return jax.ShapeDtypeStruct((B, S, H, width), dtype), keys, keys


def lines(text):
  return {line.split(':')[0].strip(): line.partition(':')[2].strip() for line in text.splitlines()[1:]}


def chosen(*arrays, **others):
  return [name for name, line in lines(explain(*arrays, **others)).items() if line.startswith('runs')]


@pytest.fixture
def cudnn(monkeypatch):
  """As if cuDNN 9.10 were installed."""
  monkeypatch.setattr(jax_cudnn, 'check_cudnn_version', lambda: 91000)


CAUSAL = Mask(causal=True)
CACHE = Mask(query_positions=jnp.zeros((1, 1024), int), key_positions=jnp.zeros((1, 1024), int))
DROP = dict(drop=lambda weights: weights)


@pytest.mark.parametrize('platform, arrays, others, name', [
    ('cpu', shapes(1024), {}, 'plain'),
    ('cpu', shapes(1025), {}, 'chunked'),
    ('cpu', shapes(1, 4096), {}, 'plain'),
    ('cpu', shapes(4096), DROP, 'plain'),
    ('tpu', shapes(1024), dict(mask=CAUSAL), 'splash'),
    ('tpu', shapes(1024), dict(mask=CACHE), 'plain'),
    ('tpu', shapes(1100), dict(mask=CAUSAL), 'chunked'),
    ('gpu', shapes(1024), dict(mask=CAUSAL), 'cudnn'),
    ('gpu', shapes(4096, dtype=jnp.float32), dict(mask=CAUSAL), 'chunked'),
    ('gpu', shapes(4096), dict(mask=CAUSAL, cap=50.), 'chunked'),
])
def test_one_runs_by_platform_sizes_and_what_is_asked(platform, arrays, others, name, cudnn):
  with on(platform):
    assert chosen(*arrays, **others) == [name]


SINKS, BIAS = dict(sinks=jnp.zeros(H)), dict(bias=jnp.zeros((1, H, 1024, 1024)))


@pytest.mark.parametrize('platform, name, arrays, others, words', [
    ('cpu', 'splash', shapes(1024), {}, 'TPU, not cpu'),
    ('cpu', 'cudnn', shapes(1024), {}, 'NVIDIA GPUs, not cpu'),
    ('cpu', 'chunked', shapes(1024), DROP, 'dropout'),
    ('gpu', 'cudnn', shapes(1024), SINKS, 'no sinks'),
    ('gpu', 'cudnn', shapes(1024), dict(cap=1.), 'no cap of the logits'),
    ('gpu', 'cudnn', shapes(1024), BIAS, 'round the bias to bfloat16'),
    ('gpu', 'cudnn', shapes(1024), DROP, 'dropout'),
    ('gpu', 'cudnn', shapes(1024, dtype=jnp.float32), {}, 'fp16/bf16.*float32'),
    ('gpu', 'cudnn', shapes(1024, width=60), {}, 'multiple of 8'),
    ('gpu', 'cudnn', shapes(1023), dict(mask=Mask(causal=True, prefix=jnp.ones((B, 1023), bool))), 'sequence length'),
    ('tpu', 'splash', shapes(1024), BIAS, 'no bias'),
    ('tpu', 'splash', shapes(1024), DROP, 'dropout'),
    ('tpu', 'splash', shapes(1024), dict(mask=CACHE), 'cache'),
    ('tpu', 'splash', shapes(1000), {}, 'multiples of 128 queries and keys, not 1000 and 1000'),
    ('tpu', 'splash', shapes(1024, dtype=jnp.float16), {}, 'not float16'),
    ('gpu', 'tokamax', shapes(1024), SINKS, 'tokamax is not installed|no sinks'),
])
def test_what_cannot_run_is_refused_with_the_reason_and_another(platform, name, arrays, others, words, cudnn):
  def attend_(*arrays):
    return attend(*arrays, scale=1., implementation=name, **others)
  with on(platform):
    with pytest.raises(CannotRun, match=f"^{name}: .*{words}.*(use|install)"):
      jax.eval_shape(attend_, *arrays)
    assert lines(explain(*arrays, **others))[name].startswith('cannot run: ')


def test_without_cudnn_the_reason_says_so():
  with on('gpu'):
    assert re.search('cuDNN(: cuDNN)?( is)? not (detected|found)', lines(explain(*shapes(1024)))['cudnn'])


def test_an_unknown_name_is_refused_with_those_that_are_known():
  with pytest.raises(ValueError, match="'flash' of attention. Allowed: chunked, cudnn, plain, splash, tokamax"):
    jax.eval_shape(lambda *arrays: attend(*arrays, scale=1., implementation='flash'), *shapes(8))


@pytest.mark.parametrize('change, message', [
    (dict(queries=jnp.zeros((B, 5, H))), r'queries \[B,S,H,k\]'),
    (dict(keys=jnp.zeros((B, 6, 3, 4))), 'where N divides H'),
    (dict(values=jnp.zeros((B, 5, N, 4))), 'where N divides H'),
    (dict(bias=jnp.zeros((1, N, 5, 6))), r'bias \[1|2,1|8,5,6\] .* not \[1, 4, 5, 6\]'),
    (dict(sinks=jnp.zeros(N)), r'sinks \[8\]'),
    (dict(mask=Mask(jnp.zeros((B, 5), int), jnp.zeros((B, 5), int))), r'mask.key_segments \[2,6\] .* not \[2, 5\]'),
    (dict(mask=Mask(key_positions=jnp.zeros((B, 5), int))), r'mask.key_positions \[1|2,6\]'),
])
def test_arrays_that_do_not_fit_together_are_refused(change, message):
  arrays = dict(queries=jnp.zeros((B, 5, H, 4)), keys=jnp.zeros((B, 6, N, 4)), values=jnp.zeros((B, 6, N, 3)))
  with checked_shapes.off(), pytest.raises(ValueError, match=message):
    attend(**{**arrays, **change}, scale=1.)


def largest_array(jaxpr):
  """The number of elements of the largest array that is computed, inside of loops and kernels too."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [variable.aval.size for variable in equation.outvars if hasattr(variable.aval, 'size')]
    sizes += [largest_array(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
  return max(sizes)


@pytest.mark.parametrize('name, platform', [('chunked', 'cpu'), ('splash', 'tpu'), ('cudnn', 'gpu'), ('plain', 'cpu')])
def test_fused_attention_and_its_gradients_hold_no_array_of_all_logits(name, platform, cudnn):
  S = 2048
  segments = jax.ShapeDtypeStruct((B, S), jnp.int32)

  def total(queries, keys, values, segments):
    mask = Mask(segments, segments, causal=True, window=700)
    return attend(queries, keys, values, scale=1., mask=mask, implementation=name).astype(jnp.float32).sum()

  with on(platform):
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*shapes(S), segments)
  # The mask of segments is the same for all heads, and only cuDNN keeps it.
  assert (largest_array(jaxpr.jaxpr) >= B * H * S * S) == (name == 'plain')
  if name == 'chunked':
    assert largest_array(jaxpr.jaxpr) == B * S * H * 64  # the queries


def lowered_for_cuda(mask, S=1024):
  def total(queries, keys, values):
    inputs = AttentionInputs(queries, keys, values, scale=0.5, mask=mask)
    return choice.kernel('cudnn').run(inputs).astype(jnp.float32).sum()
  return jax.jit(jax.grad(total, (0, 1, 2))).trace(*shapes(S)).lower(lowering_platforms=('cuda',)).as_text()


def test_cudnn_gets_causal_attention_and_the_window_as_numbers_without_a_mask(cudnn):
  text = lowered_for_cuda(Mask(causal=True, window=100))
  assert set(re.findall(r'__cudnn\$\w+', text)) == {'__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'}
  assert set(re.findall(r'sliding_window_length\S*: (\d+)', text)) == {'100'}
  assert set(re.findall(r'mask_type\S*: \\22(\w+)\\22', text)) == {'CAUSAL'}
  assert '1024x1024' not in text


def test_cudnn_gets_what_else_a_mask_forbids_as_a_bias_of_all_heads(cudnn):
  segments = jnp.ones((B, 1024), jnp.int32)
  text = lowered_for_cuda(Mask(segments, segments, causal=True))
  assert set(re.findall(r'__cudnn\$\w+', text)) == {'__cudnn$fmhaScaleBiasSoftmax',
                                                    '__cudnn$fmhaScaleBiasSoftmaxBackward'}
  assert f'{B}x1x1024x1024xbf16' in text and f'{B}x{H}x1024x1024' not in text


def devices(shape, of):
  """A mesh of the first devices."""
  axes = (*rules.BATCH_AXES, 'model')
  return Devices(np.asarray(of[:np.prod(shape)]).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize('kv_heads', [2, 1])
def test_on_a_mesh_splash_runs_on_each_device_over_its_rows_and_heads(kv_heads):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  queries, keys, values = normal(2, 128, 4, 8), normal(2, 128, kv_heads, 8), normal(2, 128, kv_heads, 8)
  segments = jnp.asarray(np.arange(128) // 50)[None] + jnp.asarray([[0], [1]])
  arguments = dict(scale=0.3, mask=Mask(segments, segments, causal=True), sinks=normal(4))
  expected = attend(queries, keys, values, **arguments, implementation='plain')
  with interpreted('tpu'), rules.use(devices((2, 1, 1, 2), jax.devices())):
    run = jax.jit(lambda *arrays: attend(*arrays, **arguments, implementation='splash'))
    np.testing.assert_allclose(run(queries, keys, values), expected, atol=1e-5)  # float32 sums of 128 terms
    # Heads are on two devices only where those of keys and values divide.
    assert f'f32[1,128,{2 if kv_heads == 2 else 4},8]' in str(jax.make_jaxpr(run)(queries, keys, values))


@pytest.mark.parametrize('name', ['plain', 'chunked'])
def test_on_a_mesh_attention_over_rows_and_heads_communicates_nothing(name):
  def gradients(queries, keys, values, segments, dout):
    mask = Mask(segments, segments, causal=True)
    run = lambda *arrays: attend(*arrays, scale=0.1, mask=mask, implementation=name)
    return jax.vjp(run, queries, keys, values)[1](dout)

  mesh, batch = devices((2, 1, 1, 2), jax.devices()), rules.BATCH_AXES
  on_heads, on_rows = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
                       for axes in ((batch, None, 'model'), (batch,)))
  queries, keys, values = shapes(256, dtype=jnp.float32)
  program = jax.jit(gradients, in_shardings=(*[on_heads] * 3, on_rows, on_heads)).lower(
      queries, keys, values, jax.ShapeDtypeStruct((B, 256), jnp.int32), queries).compile()
  assert not re.findall(r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter', program.as_text())


def compiled(devices, function, *arrays, batch=None):
  """The program for devices that need not be there; `batch` are the mesh axes that shard the first dimension."""
  here = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(batch))
  arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in arrays]
  with rules.use(devices), jax.sharding.use_abstract_mesh(devices.abstract_mesh):
    return jax.jit(function).lower(*arrays).compile()


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 1, 1, 2)])
def test_the_compiler_for_tpus_accepts_splash_and_keeps_no_square(shape):
  pytest.importorskip('libtpu', reason="compiles for TPU with libtpu: pip install -e '.[compile]'")
  mesh, S = devices(shape, topologies.load('v5e:2x2').devices), 4096

  def total(queries, keys, values, segments):
    mask = Mask(segments, segments, causal=True, window=512)
    out = attend(queries, keys, values, scale=0.1, mask=mask, sinks=jnp.zeros(H), cap=30., implementation='splash')
    return out.astype(jnp.float32).sum()

  program = compiled(mesh, jax.grad(total, (0, 1, 2)), *shapes(S, width=128), jax.ShapeDtypeStruct((B, S), jnp.int32),
                     batch=rules.BATCH_AXES)
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3  # forward, and two backward
  # Queries, keys, values and their gradients in the kernels' layout; all logits would be 1 GiB.
  assert program.memory_analysis().temp_size_in_bytes < B * H * S * 128 * 8


@pytest.mark.slow
def test_the_compiler_for_an_h100_accepts_cudnn_and_keeps_no_square(cudnn):
  if missing := topologies.missing('h100:1x1'):
    pytest.skip(str(missing))
  S = 4096

  def total(queries, keys, values):
    out = attend(queries, keys, values, scale=0.1, mask=CAUSAL, implementation='cudnn')
    return out.astype(jnp.float32).sum()

  program = compiled(devices((1, 1, 1, 1), topologies.load('h100:1x1').devices), jax.grad(total, (0, 1, 2)),
                     *shapes(S, width=128))
  assert '__cudnn$fmhaSoftmaxBackward' in program.as_text()
  # cuDNN's logarithms of sums, and gradients of keys for each query head; all logits would be 1 GiB.
  assert program.memory_analysis().temp_size_in_bytes < B * H * S * 128 * 8
