"""Do sparse language models beat dense ones of the same active compute on bytes of dialogue, after 300 steps?"""
import functools

from experiments import runner

# Decoders and encoder-decoders predict other bytes: `compared.py` compares each with its own kind.
Run = functools.partial(runner.Run, overrides={'report.at': 'never', 'evaluation.every': 300})


def sweep():
  for seed in range(3):
    yield Run('dense decoder', 'configs/dense_chitchat.py', seed)
    yield Run('Switch', 'configs/switch_chitchat.py', seed)
    yield Run('top-2 dropless', 'configs/mixtral_chitchat.py', seed)
    yield Run('hash', 'configs/hash_chitchat.py', seed)
    yield Run('dense T5', 'configs/t5_chitchat.py', seed)
    yield Run('ST-MoE', 'configs/st_moe_chitchat.py', seed)
