"""A run of several processes that loses one ends with a message and an exit code, whether jax raises or aborts."""
import subprocess
import sys
import textwrap

import jax
import pytest

from moejax.training.durability import lost_process

# Errors of gloo and the coordination service.
GLOO = 'UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:5807'
SERVICE = 'UNAVAILABLE: Failed to send RPC to coordination service.'


@pytest.mark.parametrize('error', [ValueError(GLOO), jax.errors.JaxRuntimeError(SERVICE)])
def test_an_operation_that_fails_because_a_process_died_says_so(error, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(lost_process.ProcessLost, match='Process 0: another process of the run has died .*resumes from') as lost:
    with lost_process.noticed():
      raise error
  assert lost.value.code == 3 and lost.value.at_once and lost.value.__cause__ is error


@pytest.mark.parametrize('processes, error', [
    (4, ValueError('shapes do not fit')), (4, KeyError('gloo')), (1, ValueError(GLOO))])
def test_other_errors_stay_what_they_are(processes, error, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  with pytest.raises(type(error)) as raised, lost_process.noticed():
    raise error
  assert raised.value is error


def test_an_abort_while_the_main_thread_waits_exits_with_the_message_and_the_code():
  program = textwrap.dedent('''
      import ctypes, threading, jax
      from moejax.training.durability import lost_process
      jax.process_count = lambda: 4
      with lost_process.noticed():
        threading.Timer(0.1, ctypes.CDLL(None).abort).start()
        threading.Event().wait()
  ''')
  ended = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120)
  assert ended.returncode == 3
  assert 'Process 0: jax aborted this process' in ended.stderr and 'the same command resumes' in ended.stderr
