"""The Pallas kernels, interpreted on a CPU: they pass the tests of every implementation."""
import pytest

from implementation_tests import ImplementationTests
from moejax.kernels import hopper
from moejax.kernels.choice import Shape
from moejax.kernels.target import Target


class TestPallasTpu(ImplementationTests):
  name, platform = 'pallas_tpu', 'tpu'
  D, F, examples, activations = 128, 128, 3, ('gelu', 'swiglu')


class TestTriton(ImplementationTests):
  """Inputs that Mosaic GPU does not support, here float32 and narrow matrices, run in Triton."""
  name, platform = 'pallas_gpu', 'gpu'
  D, F, examples, activations = 16, 32, 5, ('gelu', 'swiglu')


@pytest.mark.skipif(hopper.limit(Target('gpu', 'interpreted', True), Shape(1, 1, 64, 64, 'bfloat16')) is not None,
                    reason='Mosaic GPU kernels are interpreted from jax 0.11.2 on, which needs Python 3.12')
class TestHopper(ImplementationTests):
  name, platform, dtypes = 'pallas_gpu', 'gpu', ('bfloat16',)
  D, F, E, examples, activations = 64, 64, 5, 1, ('swiglu',)
