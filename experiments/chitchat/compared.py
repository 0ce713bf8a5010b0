"""Decoders beside a trigram model, and encoder-decoders, which only fill bytes in.

`python -m experiments.chitchat.compared` draws figure.png and spans.png from results.json.
"""
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments import compare, runner

METRIC = 'eval/test/bits_per_byte'
FOLDER = runner.ROOT / 'experiments/chitchat'


class Compared(NamedTuple):
  """What `compare.table` and `compare.draw` take."""
  rows: Sequence[Mapping]
  metrics: Mapping[str, str]
  references: Mapping[str, tuple[str, float]]


def decoders() -> Compared:
  """All bytes, each from those before it."""
  trigram = json.loads((FOLDER / 'trigram.json').read_text())['bits_per_byte']
  return Compared(_rows('dense decoder', 'Switch', 'top-2 dropless', 'hash'), {METRIC: 'bits per byte'},
                  {METRIC: ('trigram, Witten-Bell', trigram)})


def spans() -> Compared:
  """Bytes that were cut out."""
  return Compared(_rows('dense T5', 'ST-MoE'), {METRIC: 'bits per byte filled in'}, {})


def _rows(*names):
  return [row for row in runner.load('chitchat')['runs'] if row['name'] in names]


if __name__ == '__main__':
  compare.save(compare.draw(*decoders()), FOLDER / 'figure.png')
  compare.save(compare.draw(*spans()), FOLDER / 'spans.png')
