"""Annotations of arrays say their shapes, everywhere in the rooms of `checked_shapes`, and are checked while tests run."""
import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

import moejax
from moejax.dispatch.rows import add_rows
from moejax.experts.layouts import row_ids
from moejax.kernels import grouped_matmul
from moejax.layers.norms import RMSNorm
from moejax.routing.logits import product
from tests import checked_shapes

ROOT = pathlib.Path(moejax.__file__).parent


@pytest.mark.parametrize('call, argument', [
    (lambda: product(jnp.zeros((1, 2, 3)), jnp.zeros((4, 5))), 'kernel'),
    (lambda: add_rows(jnp.zeros((1, 2, 3)), jnp.zeros((1, 3), int), 4), 'target'),
    (lambda: row_ids(jnp.zeros(2, int), jnp.zeros(3, int), 4), 'expert'),
    (lambda: grouped_matmul(jnp.zeros((2, 3)), jnp.zeros((4, 3, 5)), jnp.zeros((4, 1), int)), 'group_sizes'),
    (lambda: RMSNorm(dim=3, axis='norm', rngs=nnx.Rngs(0))(jnp.zeros((2, 3), int)), 'x'),
], ids=['routing', 'dispatch', 'experts', 'kernels', 'layers'])
def test_a_wrong_shape_or_dtype_is_refused_in_every_room(call, argument):
  with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{argument}'"):
    call()


def test_arrays_that_are_traced_or_numpys_are_checked_too():
  @jaxtyping.jaxtyped(typechecker=checked_shapes.check_arrays)
  def doubled(x: Float[Array, 'B S'], more: Int[Array, 'B'] | None = None) -> Float[Array, 'B S']:
    return 2 * x
  np.testing.assert_array_equal(doubled(np.ones((2, 3)), np.ones(2, int)), 2)
  assert jax.jit(doubled)(jnp.ones((2, 3))).shape == (2, 3)
  for arguments in [(np.ones(2),), (np.ones((2, 3)), np.ones(3, int)), (np.ones((2, 3)), np.ones(2))]:
    with pytest.raises(jaxtyping.TypeCheckError):
      jax.jit(doubled)(*arguments)
  with checked_shapes.off():
    assert doubled(jnp.ones(2)).shape == (2,)


def test_annotations_without_arrays_are_left_to_those_who_read_configs():
  @jaxtyping.jaxtyped(typechecker=checked_shapes.check_arrays)
  def scaled(x: Float[Array, ''], by: float) -> Float[Array, '']:
    return x * by
  assert scaled(jnp.float32(2), 3) == 6


def unshaped(path: pathlib.Path) -> list[str]:
  """The arguments and results of public functions in a file that are annotated as arrays without a shape."""
  found = []

  def visit(body, prefix):
    for node in body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        visit(node.body, f'{prefix}{node.name}.')
      if isinstance(node, ast.FunctionDef) and (not node.name.startswith('_') or node.name == '__call__'):
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        hints = {argument.arg: argument.annotation for argument in arguments if argument.arg != 'key'}
        hints['the result'] = node.returns
        found.extend(f'{path.relative_to(ROOT)}: {prefix}{node.name}: {name}' for name, hint in hints.items()
                     if hint is not None and 'jax.Array' in ast.unparse(hint) and 'Callable' not in ast.unparse(hint))

  visit(ast.parse(path.read_text(encoding='utf-8')).body, '')
  return found


def test_public_functions_say_the_shapes_of_their_arrays():
  """Besides keys, and functions as arguments."""
  rooms = [ROOT.joinpath(*package.split('.')[1:]) for package in checked_shapes.PACKAGES]
  assert not [line for room in rooms for path in sorted(room.rglob('*.py')) for line in unshaped(path)]


def test_who_uses_moejax_pays_for_no_check():
  program = "import sys, moejax.models, moejax.training.loop; assert 'beartype' not in sys.modules"
  subprocess.run([sys.executable, '-c', program], check=True)
