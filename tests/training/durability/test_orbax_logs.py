"""What orbax prints besides raising it is not printed; everything else is."""
import logging
import sys
import types

import pytest
from absl import logging as absl_logging

from moejax.training.durability import orbax_logs

ABSL, ASYNCIO = absl_logging.get_absl_logger(), logging.getLogger('asyncio')


@pytest.fixture
def printed(monkeypatch):
  """The output that reaches the terminal."""
  lines = []

  def hook(unraisable):
    lines.append(str(unraisable.exc_value))

  monkeypatch.setattr(sys, 'unraisablehook', hook)
  handler = logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  for logger in (ABSL, ASYNCIO):
    logger.addHandler(handler)
  for _ in range(2):  # a process may train twice
    orbax_logs.silence()
  yield lines
  for logger in (ABSL, ASYNCIO):
    logger.removeHandler(handler)


def log(logger, path, message):
  logger.handle(logging.LogRecord(logger.name, logging.ERROR, path, 1, message, (), None))


def test_a_full_disk_is_not_reported_by_the_library_as_well(printed):
  log(ABSL, '/site-packages/orbax/checkpoint/_src/futures/future.py', 'RESOURCE_EXHAUSTED')
  log(ASYNCIO, '/lib/asyncio/base_events.py', 'Task exception was never retrieved: /site-packages/orbax/x.py')
  sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError('Event loop is closed')))
  assert printed == []


def test_messages_of_others_are_printed_once(printed):
  log(ABSL, '/site-packages/grain/x.py', 'slow')
  log(ASYNCIO, '/lib/asyncio/base_events.py', 'Task exception was never retrieved: /mine.py')
  sys.unraisablehook(types.SimpleNamespace(exc_value=ValueError('in __del__')))
  assert printed == ['slow', 'Task exception was never retrieved: /mine.py', 'in __del__']
