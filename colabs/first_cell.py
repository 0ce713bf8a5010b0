#@title Installs moejax where it is missing, and leaves a jax that works as it is
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

REPOSITORY = 'https://github.com/moejax/moejax'
SOURCE = pathlib.Path('moejax_source')
LEAST_JAX, BELOW_JAX = '0.10.2', '0.13'


def run(command, failed):
  """Runs a command; if it fails, the notebook ends with one sentence."""
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    sys.exit(f'{failed}: {command[0]} is not installed.')
  if done.returncode:
    sys.exit(f'{failed}: {(done.stderr.strip() or "it says nothing").splitlines()[-1]}')


def working_jax():
  """(version, 'cpu', 'gpu' or 'tpu') of the jax of this runtime, asked in another process; ('', 'cpu') without."""
  asked = subprocess.run([sys.executable, '-c', 'import jax; print(jax.__version__, jax.default_backend())'],
                         capture_output=True, text=True)
  return tuple(asked.stdout.split()[-2:]) if asked.returncode == 0 else ('', 'cpu')


def numbers(version):
  return tuple(int(part) for part in re.findall(r'\d+', version)[:3])


def for_pip():
  """(what to install besides moejax, what pip must leave as it is) for the accelerator of this runtime."""
  version, platform = working_jax()
  if platform == 'cpu':
    return [], []
  mine = {found.name.lower(): found.version for found in importlib.metadata.distributions()
          if re.fullmatch(r'jax|jaxlib|jax[-_].*(plugin|pjrt)|libtpu', found.name.lower())}
  if numbers(version) >= numbers(BELOW_JAX):
    sys.exit(f'The jax {version} of this runtime is newer than moejax supports (below {BELOW_JAX}): choose an older '
             'runtime version (Runtime > Change runtime type), or one without accelerator.')
  if numbers(version) >= numbers(LEAST_JAX):
    return [], [f'{name}=={version}' for name, version in sorted(mine.items())]
  extra = next((found[0] for name in mine if (found := re.search(r'cuda\d+', name))), platform)
  print(f'The jax {version} of this runtime is older than moejax supports (from {LEAST_JAX}): it is upgraded.')
  return [f'jax[{extra}]>={LEAST_JAX},<{BELOW_JAX}'], []


def device():
  import jax
  return f'moejax runs on {jax.device_count()} x {jax.devices()[0].device_kind} with jax {jax.__version__}.'


if importlib.util.find_spec('moejax') is None:
  if not SOURCE.exists():
    run(['git', 'clone', '--quiet', '--depth=1', REPOSITORY, str(SOURCE)], f'moejax cannot be fetched from {REPOSITORY}')
  besides, kept = for_pip()
  constraints = pathlib.Path('moejax_constraints.txt')
  constraints.write_text('\n'.join(kept))
  run([sys.executable, '-m', 'pip', 'install', '--quiet', '--constraint', str(constraints), *besides,
       '-e', f'./{SOURCE}[data]'], 'moejax cannot be installed')
  sys.path.insert(0, str(SOURCE))  # This process started before moejax was installed.

print(device())
