"""Signals: the first is noted, so that the loop stops where it can; the second ends the process."""
import os
import signal

import pytest

from moejax.training.durability import stop_reasons



@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops_at_once(number):
  with stop_reasons.Interruption() as interruption:
    assert interruption.signal is None
    os.kill(os.getpid(), number)
    assert interruption.signal == number
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), number)
  assert stop_reasons.Interrupted('', number).code == 128 + number


def test_a_signal_is_noted_even_if_nobody_reads_the_message(monkeypatch):
  def nobody(*arguments):
    raise BrokenPipeError
  with stop_reasons.Interruption() as interruption:
    monkeypatch.setattr(os, 'write', nobody)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.signal == signal.SIGTERM
