"""Do sparse vision transformers beat a dense one of the same active compute on 1,437 handwritten digits?"""
from experiments.runner import Run

METRICS = {'eval/test/accuracy': 'test accuracy', 'eval/few_shot/10_shot_accuracy': '10-shot accuracy'}


def sweep():
  for seed in range(3):
    yield Run('dense ViT', 'configs/vit_digits.py', seed)
    yield Run('V-MoE', 'configs/vmoe_digits.py', seed)
    yield Run('Soft MoE', 'configs/soft_moe_digits.py', seed)
    yield Run('Expert Choice', 'configs/expert_choice_digits.py', seed)
