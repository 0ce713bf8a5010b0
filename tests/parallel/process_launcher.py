"""Starts processes that together are one run: gloo, on this machine, with a few simulated devices each."""
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(devices, cache=None):
  """Of a process with so many devices; `cache` keeps compiled programs for the next one."""
  # Most of the time would go into optimising programs that run for milliseconds.
  variables = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(devices), PYTHONPATH=str(ROOT),
                   JAX_DISABLE_MOST_OPTIMIZATIONS='1')
  variables.pop('XLA_FLAGS', None)
  if cache is not None:
    variables |= dict(JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
                      JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1')
  return variables


def free_port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def start(arguments, count, devices=2, cache=None):
  """`python *arguments` in `count` processes that find one another by --coordinator; a single one needs no flags."""
  address = f'localhost:{free_port()}'
  flags = [[f'--coordinator={address}', f'--num_processes={count}', f'--process_id={index}'] for index in range(count)]
  return [subprocess.Popen([sys.executable, *map(str, arguments), *(flag if count > 1 else [])], text=True,
                           env=environment(devices, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
          for flag in flags]


def finish(processes, timeout=900):
  """[(exit code, output, errors)] of each. None outlives this."""
  try:
    results = [(*process.communicate(timeout=timeout), process.returncode) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(code, out, err) for out, err, code in results]


def run(arguments, count, **options):
  """The outputs of all, which must end well."""
  results = finish(start(arguments, count, **options))
  for code, out, err in results:
    assert code == 0, f'{out}\n{err}'
  return [out for _, out, _ in results]
