"""Every test runs on eight simulated devices, whatever the machine has."""
import gc
import os
from importlib import metadata

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The tests' many small programs take longer to optimise than to run: together a third to a half of the whole run.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
_EVERYWHERE = os.environ['XLA_FLAGS']
if metadata.version('jax').startswith('0.10.'):  # later ones end the process at flags that they no longer know
  os.environ['XLA_FLAGS'] = f'--xla_cpu_use_fusion_emitters=false {_EVERYWHERE}'

import hypothesis
import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.devices()  # reads the flags; libtpu, which does so when a TPU program is compiled, knows those for CPUs as little
os.environ['XLA_FLAGS'] = _EVERYWHERE

from tests import checked_shapes

checked_shapes.install()

# Tracing makes many small objects, few of them in cycles. To look for these as often as Python does takes a tenth of
# the time.
gc.freeze()
gc.set_threshold(200_000, 20, 20)

# Compilation dominates the first example, so a deadline would only measure the machine.
hypothesis.settings.register_profile('moejax', deadline=None, max_examples=15, derandomize=True, print_blob=True,
                                    suppress_health_check=[hypothesis.HealthCheck.differing_executors])
hypothesis.settings.load_profile('moejax')


@pytest.fixture(autouse=True, scope='module')
def release_compiled_programs():
  """Thousands of small programs would otherwise stay in memory until the end of the run."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def emulated_bucket():
  """The environment of processes that see gs://bucket; this one does, for clients are kept as long as it lives."""
  from gcs_emulator import serving
  with serving() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    yield dict(os.environ)
