"""V-MoE on handwritten digits: the first run.

System: V-MoE
Paper: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974), at the smallest size
  that shows it: 8x8 images, 4 layers, experts in layers 1 and 3. Two of 8 experts per patch, each half as wide as the
  dense feed-forward, for the active compute of configs/vit_digits.py.
Command: python -m moejax.train --config=configs/vmoe_digits.py --workdir=runs/vmoe_digits
Cost: about a minute and a half on 2 CPU cores.
Result: experiments/digits/results.json, and the table in README.md.
Proof: numbers: tests/routing/balance/test_balancers.py::test_the_load_loss_of_the_golden_logits,
  tests/routing/balance/test_balancers.py::test_the_importance_loss_of_the_golden_gates,
  tests/routing/place/test_capacity.py::test_every_priority_keeps_what_a_queue_filled_one_by_one_keeps,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[vmoe]
Differs: the released configs train with priority by position (batch_priority=False) and have another factor at
  evaluation; here batch priority is always on. Kernels of attention and feed-forwards are initialised with fan-in
  truncated normals, there xavier-uniform. Ensembles of experts (E3) are omitted.
"""
from moejax.routing import papers
from moejax.training.setup import default_config


def get_config():
  config = default_config()
  config.model = dict(
      name='vision', image_size=8, channels=1, patch_size=2, num_classes=10, dim=64, num_layers=4,
      attention=dict(heads=4), feed_forward=dict(hidden=256),
      positions=dict(name='sincos2d'), sparse=dict(name='every', n=2),
      moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=128, init='identical'),
               router=papers.vmoe(k=2), dispatch=dict(name='gather'),
               group=128))  # 8 images of 16 patches, as many images as in the paper
  config.objective = dict(name='classification', label_smoothing=0.1)
  config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=64)
  config.optimizer = dict(name='adamw', weight_decay=0.1, clip=1.0, schedule=dict(name='cosine', peak=2e-3, warmup=100))
  config.training.steps = 800
  config.evaluation = dict(every=200, evaluators=dict(
      test=dict(name='accuracy', split='test'), few_shot=dict(name='few_shot', shots=(1, 5, 10))))
  config.checkpoint = dict(every=200, keep=2, metric='eval/test/accuracy', mode='max')
  return config
