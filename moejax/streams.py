"""Lets a program run on without a reader of its standard output or error: it is silent there.

    python -m moejax.train ... | head -1        python -m moejax.train ... 2>&-
"""
import io
import os
import sys


def outlive_readers() -> None:
  """Makes stdout and stderr silent, instead of failing, once their reader is gone or if they are closed.

  Streams that a notebook or a test has put in their places stay as they are.
  """
  for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
    stream, original = getattr(sys, name), getattr(sys, f'__{name}__')
    if stream is not original or isinstance(getattr(getattr(stream, 'buffer', None), 'raw', None), _Outliving):
      continue
    try:
      os.fstat(descriptor)
    except OSError:
      # Never left free: the next file opened would get this number, and receive what libraries print.
      _silence(descriptor)
    if stream is not None:
      stream.flush()
    made = io.TextIOWrapper(io.BufferedWriter(_Outliving(descriptor, 'w', closefd=False)),
                            encoding=stream.encoding if stream else 'utf-8', errors='backslashreplace',
                            line_buffering=True)  # the reader of a pipe sees progress
    setattr(sys, name, made)
    setattr(sys, f'__{name}__', made)


class _Outliving(io.FileIO):

  def write(self, data):
    try:
      return super().write(data)
    except BrokenPipeError:
      _silence(self.fileno())  # for all writers, libraries too
      return len(data)


def _silence(descriptor):
  nowhere = os.open(os.devnull, os.O_WRONLY)
  if nowhere != descriptor:
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
