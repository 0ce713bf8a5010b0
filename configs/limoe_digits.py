"""LIMoE on handwritten digits with templated captions ('a bold narrow seven leaning left').

System: LIMoE
Paper: Mustafa et al. 2022, "Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts"
  (arXiv 2206.02770), at the smallest size that shows it: 16 patches and 6 words per pair, 8 experts in layers 1 and 3.
  The soft minimum of experts is 4 for images and 2 for text; 20 and 9 of 32 in the paper.
Command: python -m moejax.train --config=configs/limoe_digits.py --workdir=runs/limoe_digits
Cost: about three minutes on 2 CPU cores.
Result: zero-shot accuracy 0.84 over 10 digits; recall at 1 of 0.57 (image to text) and 0.72 (text to image) among 360
  pairs of the test split. One seed, with 5 for the 4 experts of the images.
Proof: numbers: tests/routing/balance/test_modality_entropy.py::test_entropies_and_thresholds_are_those_derived_by_hand,
  tests/training/test_contrastive_and_ctc.py::test_the_contrastive_loss_is_that_of_a_loop_over_pairs,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[limoe]
Differs: no code is published; thresholds, coefficients and the mean pooling of both modalities are second-hand. A mask
  over the joint sequence keeps attention within each modality.
"""
from moejax.routing import papers
from moejax.training.setup import default_config


def get_config():
  config = default_config()
  config.model = dict(
      name='two_modalities', image_size=8, channels=1, patch_size=2, vocab_size=256, text_length=6, dim=64,
      embedding_dim=32, num_layers=4, attention=dict(heads=4), feed_forward=dict(hidden=256),
      sparse=dict(name='every', n=2),
      moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=256, init='identical'),
               router=papers.limoe(image_experts=4., text_experts=2.), dispatch=dict(name='gather'),
               group=176))  # 8 pairs of 16 patches and 6 words
  config.objective = dict(name='contrastive')
  config.data = dict(name='image_text', source=dict(name='digits_with_captions'), image_size=8, channels=1,
                     tokenizer=dict(name='hashed_words', vocab_size=256), length=6, batch_size=64)
  config.optimizer = dict(name='adamw', weight_decay=0.1, clip=1.0, schedule=dict(name='cosine', peak=2e-3, warmup=100))
  config.training.steps = 800
  config.evaluation = dict(every=200, evaluators=dict(test=dict(name='retrieval'), zero_shot=dict(name='zero_shot')))
  config.checkpoint = dict(every=200, keep=2, metric='eval/zero_shot/accuracy', mode='max')
  return config
