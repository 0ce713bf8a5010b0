"""Baseline for the language models: a trigram model of the same bytes. `python -m experiments.chitchat.trigram`"""
import json
import pathlib

from configs import dense_chitchat
from moejax import data
from moejax.data.ngram import trigram_baseline

if __name__ == '__main__':
  measured = trigram_baseline(data.build(dense_chitchat.get_config().data, 'config.data'))
  path = pathlib.Path(__file__).with_name('trigram.json')
  path.write_text(json.dumps(dict(command='python -m experiments.chitchat.trigram', **measured), indent=1) + '\n')
  print(f'{path.name}: {measured["bits_per_byte"]:.3f} bits per byte.')
