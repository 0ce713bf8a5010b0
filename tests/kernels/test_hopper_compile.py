"""Hopper kernels compile for an absent H100, at the sizes of real models, and ptxas reports no problems.

What comes out is the program that a GPU would run: it fits the shared memory, and ptxas says of each kernel whether the
registers suffice and the tensor cores' instructions stay asynchronous. Only its speed is not known.
"""
import functools
import re

import jax
import pytest

from moejax.kernels import fp8, hopper, hopper_fp8, padding
from moejax.kernels.choice import Shape
from moejax.kernels.expert_block import ACTIVATIONS, GATES
from moejax.planning import topologies

pytestmark = pytest.mark.skipif(topologies.missing('h100:1x1') is not None, reason=str(topologies.missing('h100:1x1')))

MIXTRAL = Shape(16384, 8, 4096, 14336, 'bfloat16')
OLMOE = Shape(262144, 64, 2048, 1024, 'bfloat16')
GPT_OSS = Shape(65536, 32, 2880, 2880, 'float16')  # not a multiple of the tiles
slow = pytest.mark.slow


@functools.cache
def mesh():
  return jax.sharding.Mesh(topologies.load('h100:1x1').devices, ('device',), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture
def compiled(monkeypatch, capfd):
  """Compiles a kernel at a shape; returns the program's text, its temporary bytes, and what ptxas said."""
  def compile_(kernel, shape, tiles=None, activation=None):
    monkeypatch.setenv('MOSAIC_GPU_DUMP_PTXAS', '1')
    function, arguments = program(kernel, shape, tiles, activation)
    here = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for a in arguments]
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
      result = jax.jit(function).lower(*arguments).compile()
    out, err = capfd.readouterr()
    return result.as_text(), result.memory_analysis().temp_size_in_bytes, out + err
  return compile_


def program(kernel, shape, tiles, activation):
  """A function, and the shapes of its arguments."""
  rows = padding.padded_rows(shape.rows, shape.groups, hopper.ROW_MULTIPLE)
  array = lambda *size, dtype=shape.dtype: jax.ShapeDtypeStruct(size, dtype)
  x, dy, w = array(rows, shape.inner), array(rows, shape.outer), array(shape.groups, shape.inner, shape.outer)
  sizes = array(shape.groups, dtype='int32')
  if kernel == 'matmul':
    return functools.partial(hopper.matmul, tiles=tiles), (x, w, sizes)
  if kernel == 'transposed':
    return functools.partial(hopper.matmul, transpose=True, tiles=tiles), (dy, w, sizes)
  if kernel == 'weight_gradient':
    return functools.partial(hopper.weight_gradient, tiles=tiles), (x, dy, sizes)
  if kernel == 'fp8':
    quantized = *jax.eval_shape(fp8.quantize_rows, x), *jax.eval_shape(fp8.quantize_matrices, w)
    return functools.partial(hopper_fp8.matmul, dtype='bfloat16'), (*quantized, sizes)
  if activation in GATES:
    return functools.partial(hopper.up, activation=activation, tiles=tiles), (x, w, w, sizes)
  return (lambda x, w, sizes: hopper.up(x, w, None, sizes, activation, tiles=tiles)), (x, w, sizes)


def check(result, spilled=0):
  text, temporary, ptxas = result
  assert text.count('mosaic_gpu') and ' transpose(' not in text
  # Of the size of the groups, not of rows: what is read transposed was not copied.
  assert temporary < 2**20
  assert 'bytes spill stores' in ptxas and not re.search('C7510|serializ', ptxas)
  assert all(int(count) <= spilled for count in re.findall(r'(\d+) bytes spill (?:stores|loads)', ptxas)), ptxas


def test_the_forward_product_at_the_size_of_mixtral(compiled):
  check(compiled('matmul', MIXTRAL))


@slow
@pytest.mark.parametrize('kernel, shape', [
    *(('matmul', shape) for shape in (OLMOE, GPT_OSS)),
    *((kernel, shape) for kernel in ('transposed', 'weight_gradient') for shape in (MIXTRAL, OLMOE, GPT_OSS))], ids=str)
def test_products_spill_no_registers(compiled, kernel, shape):
  check(compiled(kernel, shape))


@slow
@pytest.mark.parametrize('shape', [MIXTRAL, OLMOE], ids=str)
def test_8_bit_products_spill_no_registers(compiled, shape):
  text, temporary, ptxas = compiled('fp8', shape)
  # The scales of rows, one for 128 numbers, are laid out as the kernel reads them.
  rows = padding.padded_rows(shape.rows, shape.groups, hopper.ROW_MULTIPLE)
  check((text.replace(' transpose(', ''), temporary - rows * shape.inner // 128 * 4, ptxas))


@slow
@pytest.mark.parametrize('activation', [*ACTIVATIONS, *GATES])
def test_up_spills_no_more_than_a_few_addresses_a_tile(compiled, activation):
  check(compiled('up', OLMOE, activation=activation), spilled=64)


@slow
@pytest.mark.parametrize('kernel', ['matmul', 'transposed', 'weight_gradient', 'up'])
def test_every_candidate_compiles(compiled, kernel):
  # The first is what the tests above compile; the compiler says nothing of a kernel that it knows.
  for tiles in hopper.candidates(kernel, OLMOE)[1:]:
    check(compiled(kernel, OLMOE, tiles, 'swiglu'), spilled=64)
