"""Sparse upcycling on handwritten digits: a trained dense vision transformer becomes a mixture of experts, and trains on.

System: Sparse upcycling
Paper: Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv 2212.05055),
  section 3: every expert starts as a copy of the dense feed-forward that it replaces, the router is new, and all else is
  copied. The source is a run of configs/vit_digits.py in runs/vit_digits; set another with --config.init.path.
Command: python -m moejax.train --config=configs/upcycling_digits.py --workdir=runs/upcycling_digits
Cost: about a minute on 2 CPU cores, after the run of configs/vit_digits.py.
Result: test accuracy 0.967 after 400 steps, 0.975 of its source; one seed, 360 images.
Proof: identities:
  tests/training/test_initial.py::test_an_upcycled_model_computes_the_function_of_the_dense_one_whatever_its_router_chooses
Differs: the paper routes by Expert Choice in encoders, with combine weights renormalised to sum to one, so a token that
  no expert takes is left out; here every patch has two of 8 experts, whose weights always sum to one, so that before
  training the model computes the function of the dense one. The paper can resume the optimizer's state; here it starts
  anew, with a lower learning rate.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.init = dict(name='checkpoint', path='runs/vit_digits', rules=(
      dict(ours='/moe/experts/', source='/feed_forward/', do='repeat'), dict(ours='/moe/router/', do='reinitialise')))
  config.model.moe.router = papers.top_k_dropless(k=2)
  config.model.moe.experts = dict(name='feed_forward', hidden=256)
  config.model.moe.dispatch = dict(name='grouped')
  config.optimizer.schedule.peak = 5e-4
  config.training.steps = 400
  return config
