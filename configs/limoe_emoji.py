"""LIMoE on emoji and their names: real captions, of pictures in colour.

Paper: Mustafa et al. 2022, "Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts"
  (arXiv 2206.02770): 64 patches and at most 8 words per pair, 8 experts in layers 1 and 3. Needs `pip install
  'moejax[pairs]'`: 1,898 emoji, of which 300 are held out, so training says little about new ones.
Command: python -m moejax.train --config=configs/limoe_emoji.py --workdir=runs/limoe_emoji
Cost: about ten minutes on 2 CPU cores (estimated).
Result: not run to the end; a random guess has a recall at 1 of 0.3%.
"""
from configs import limoe_digits


def get_config():
  config = limoe_digits.get_config()
  config.model.update(image_size=32, channels=3, patch_size=4, vocab_size=4096, text_length=8)
  config.model.moe.group = 576  # 8 pairs of 64 patches and 8 words
  config.data = dict(name='image_text', source=dict(name='emoji'), image_size=32, channels=3,
                     tokenizer=dict(name='hashed_words', vocab_size=4096), length=8, batch_size=64)
  return config
