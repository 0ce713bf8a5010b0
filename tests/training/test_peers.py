"""A run of several processes that loses one ends with a sentence and a code, whether jax raises or aborts."""
import subprocess
import sys
import textwrap

import jax
import pytest

from moejax.training import peers

# What gloo and the coordination service say.
GLOO = 'UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:5807'
SERVICE = 'UNAVAILABLE: Failed to send RPC to coordination service.'


@pytest.mark.parametrize('error', [ValueError(GLOO), jax.errors.JaxRuntimeError(SERVICE)])
def test_an_operation_that_fails_for_want_of_a_process_says_so(error, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(peers.PeerLost, match='Process 0: another process of the run has died .*resumes from') as lost:
    with peers.noticed():
      raise error
  assert lost.value.code == 3 and lost.value.at_once and lost.value.__cause__ is error


@pytest.mark.parametrize('processes, error', [
    (4, ValueError('shapes do not fit')), (4, KeyError('gloo')), (1, ValueError(GLOO))])
def test_other_errors_stay_what_they_are(processes, error, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  with pytest.raises(type(error)) as raised, peers.noticed():
    raise error
  assert raised.value is error


def test_an_abort_in_a_thread_while_the_main_thread_waits_ends_with_the_sentence_and_the_code():
  program = textwrap.dedent('''
      import ctypes, threading, jax
      from moejax.training import peers
      jax.process_count = lambda: 4
      with peers.noticed():
        threading.Timer(0.1, ctypes.CDLL(None).abort).start()
        threading.Event().wait()
  ''')
  ended = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120)
  assert ended.returncode == 3
  assert 'Process 0: jax has ended this process' in ended.stderr and 'the same command resumes' in ended.stderr
