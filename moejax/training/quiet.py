"""What orbax and tensorstore print besides raising it: hundreds of lines for a full disk, of which one is said here."""
import logging
import sys

from absl import logging as absl_logging


def libraries() -> None:
  """From here on orbax logs nothing, nor asyncio about its tasks; what reports to an event loop that ended is dropped."""
  for logger in (absl_logging.get_absl_logger(), logging.getLogger('asyncio')):
    logger.addFilter(_is_not_of_orbax)
  before = sys.unraisablehook
  if before.__module__ == __name__:
    return

  def all_but_late_reports(unraisable):
    # The loop ended with the first write that failed; the others fail as well.
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)
  sys.unraisablehook = all_but_late_reports


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return '/orbax/' not in record.pathname and '/orbax/' not in record.getMessage()
