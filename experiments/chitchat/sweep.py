"""Do sparse language models beat dense ones of the same active compute on bytes of dialogue, after 300 steps?"""
import functools
import json

from experiments import runner

METRICS = {'eval/test/bits_per_byte': 'bits per byte (T5 and ST-MoE: of the bytes filled in)'}
TRIGRAM = json.loads((runner.ROOT / 'experiments/chitchat/trigram.json').read_text())
REFERENCES = {'eval/test/bits_per_byte': ('trigram, Witten-Bell', TRIGRAM['bits_per_byte'])}

Run = functools.partial(runner.Run, overrides={'report.at': 'never', 'evaluation.every': 300})


def sweep():
  for seed in range(3):
    yield Run('dense decoder', 'configs/dense_chitchat.py', seed)
    yield Run('Switch', 'configs/switch_chitchat.py', seed)
    yield Run('top-2 dropless', 'configs/mixtral_chitchat.py', seed)
    yield Run('hash', 'configs/hash_chitchat.py', seed)
    yield Run('dense T5', 'configs/t5_chitchat.py', seed)
    yield Run('ST-MoE', 'configs/st_moe_chitchat.py', seed)
