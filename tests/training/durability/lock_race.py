"""Runs that start in the same folder at the same moment."""
import threading

from moejax.config import ConfigError
from moejax.training.durability import lock


def outcomes(count, folder):
  """'held' or 'refused' for each of `count` runs, of which those that get the folder keep it until all have tried."""
  found, everybody, done = [], threading.Barrier(count), threading.Event()

  def start():
    everybody.wait()
    try:
      with lock.held(folder, lambda sentence: None):
        found.append('held')
        done.wait(30)
    except ConfigError:
      found.append('refused')
      if len(found) == count:
        done.set()

  threads = [threading.Thread(target=start) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return found
