"""X-MoE as a decoder on dialogues: low-dimensional cosine routing against representation collapse.

System: X-MoE
Paper: Chi et al. 2022, "On the Representation Collapse of Sparse Mixture of Experts" (arXiv 2204.09179), section 3: one
  of 8 residual experts for each byte, in an extra layer between two blocks, chosen by cosine similarity in 4
  dimensions. Variant 'torchscale' is the router of that library's release, in layers that replace a feed-forward.
Command: python -m moejax.train --config=configs/xmoe_chitchat.py --workdir=runs/xmoe_chitchat
Cost: about two minutes on 2 CPU cores.
Result: Expected: a little below configs/dense_chitchat.py.
Proof: numbers: tests/routing/score/test_cosine.py::test_xmoe_is_the_loop_over_tokens_of_its_equations,
  tests/routing/score/test_cosine.py::test_torchscale_divides_by_the_length_of_experts_alone,
  tests/experts/test_residual_stack.py::test_added_to_its_input_the_layer_mixes_the_expert_with_the_identity
Differs: form='paper' follows the paper, with hyperparameters of the authors' research code, now maintained by others.
  Their release in torchscale (form='torchscale') scales only experts to unit length, has no temperature, and is
  otherwise a Switch router; it rescales its expert embeddings in storage, here at every use, with the same gradient.
"""
from configs import dense_chitchat
from moejax.routing import papers

VARIANTS = ('paper', 'torchscale')


def get_config(form='paper'):
  config = dense_chitchat.get_config()
  config.model.moe = dict(num_experts=8, router=papers.xmoe(form=form, dim=4))
  if form == 'paper':
    config.model.update(sparse=dict(name='layers', indices=(0,)), sparse_form='insert')
    config.model.moe.update(experts=dict(name='residual_stack', hidden=512, sublayers=1),
                            dispatch=dict(name='grouped'), group='batch')
  else:
    config.model.sparse = dict(name='every', n=2)
    config.model.moe.update(experts=dict(name='feed_forward', hidden=384, activation='swiglu'),
                            dispatch=dict(name='gather'), group='sequence')
  return config
