"""Standard output and error that nobody reads are silence: what is printed falls away, and the program runs on.

    python -m moejax.train ... | head -1        python -m moejax.train ... 2>&-
"""
import io
import os
import sys


def outlive_readers() -> None:
  """Makes stdout and stderr of this process silent, instead of failing, where their reader is gone or they are closed.

  Streams that something else has put in their places (a notebook, a test) stay as they are.
  """
  for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
    stream, original = getattr(sys, name), getattr(sys, f'__{name}__')
    if stream is not original or isinstance(getattr(getattr(stream, 'buffer', None), 'raw', None), _Outliving):
      continue
    try:
      os.fstat(descriptor)
    except OSError:
      # Never left free: the next file that is opened would have this number, and receive what libraries print.
      _silence(descriptor)
    if stream is not None:
      stream.flush()
    made = io.TextIOWrapper(io.BufferedWriter(_Outliving(descriptor, 'w', closefd=False)),
                            encoding=stream.encoding if stream else 'utf-8', errors='backslashreplace',
                            line_buffering=True)  # who reads a pipe wants to see how far it is
    setattr(sys, name, made)
    setattr(sys, f'__{name}__', made)


class _Outliving(io.FileIO):

  def write(self, data):
    try:
      return super().write(data)
    except BrokenPipeError:
      _silence(self.fileno())  # for all who write there, libraries too
      return len(data)


def _silence(descriptor):
  nowhere = os.open(os.devnull, os.O_WRONLY)
  if nowhere != descriptor:
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
