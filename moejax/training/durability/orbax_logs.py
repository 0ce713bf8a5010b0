"""Silences what orbax and tensorstore print besides raising it: hundreds of lines for a full disk, say."""
import logging
import sys

from absl import logging as absl_logging


def silence() -> None:
  """Silences the logs of orbax, and of asyncio about its tasks; drops errors about a closed event loop."""
  for logger in (absl_logging.get_absl_logger(), logging.getLogger('asyncio')):
    logger.addFilter(_is_not_of_orbax)
  before = sys.unraisablehook
  if before.__module__ == __name__:
    return

  def all_but_late_reports(unraisable):
    # The first write that failed closed the loop; the others fail as well.
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)
  sys.unraisablehook = all_but_late_reports


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return '/orbax/' not in record.pathname and '/orbax/' not in record.getMessage()
