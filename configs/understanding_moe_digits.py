"""A mixture of cubic filters that separates upright from rotated digits, and must find the ten digits by itself.

System: Towards Understanding MoE
Paper: Chen et al. 2022, "Towards Understanding Mixture of Experts in Deep Learning" (arXiv 2208.02813), its
  experiment on images: the label is whether an image is rotated, and the clusters are its classes. The experiment on
  the paper's own data is experiments/paper_effects/programs/clusters.py.
Command: python -m moejax.train --config=configs/understanding_moe_digits.py --workdir=runs/understanding_moe_digits
Cost: about a minute on 2 CPU cores.
Result: Expected: more accurate with cubic experts than with linear ones (model.moe.experts.activation=linear).
Proof: numbers: tests/models/test_clusters.py::test_the_model_equals_a_loop_in_float64,
  tests/training/test_normalized_descent.py::test_every_expert_goes_as_far_as_any_other
Differs: 8x8 digits and filters instead of CIFAR-10 and ResNets, a quarter turn instead of 30 degrees. The loss applies
  a softmax to probabilities, as in the published code.
"""
from moejax.routing import papers
from moejax.training.setup import default_config


def get_config():
  config = default_config()
  config.model = dict(
      name='patch_mixture', image_size=8, channels=1, patch_size=8, num_classes=2,
      moe=dict(num_experts=8, experts=dict(filters=8, activation='cubic', init_scale=0.1),
               router=papers.understanding_moe(weight='softmax', balance=0.01)))
  config.objective = dict(name='classification')
  config.data = dict(name='images', source=dict(name='rotated_digits'), image_size=8, channels=1, batch_size=128)
  config.optimizer = dict(name='normalized_sgd', momentum=0.9, others=0.01, weight_decay=5e-4,
                          schedule=dict(name='cosine', peak=1e-2))
  config.training.steps = 1000
  config.evaluation = dict(every=250, evaluators=dict(test=dict(name='accuracy', split='test')))
  config.checkpoint.every = 250
  return config
