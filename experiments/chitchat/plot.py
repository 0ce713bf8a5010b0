"""Draws figure.png from results.json: bits per byte of every run, by model. `python -m experiments.chitchat.plot`"""
import json

from experiments.plotting import save, strip
from experiments.runner import ROOT

if __name__ == '__main__':
  trigram = json.loads((ROOT / 'experiments/chitchat/trigram.json').read_text())['bits_per_byte']
  save('chitchat', strip('chitchat', 'eval/test/bits_per_byte', 'bits per byte (T5 and ST-MoE: of the bytes filled in)',
                         reference=('trigram', trigram)))
