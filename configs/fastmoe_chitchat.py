"""FastMoE's layer on dialogues, at the active compute of configs/dense_chitchat.py: its GShard gate over 8 experts.

System: FastMoE
Paper: He et al. 2021, "FastMoE: A Fast Mixture-of-Expert Training System" (arXiv 2103.13262): a gate class, experts of
  two matrices with GELU and biases. `papers.fastmoe(gate=...)` has the other gates: naive, switch, dc, faster, zero.
Command: python -m moejax.train --config=configs/fastmoe_chitchat.py --workdir=runs/fastmoe_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: close to configs/gshard_chitchat.py; not measured.
Proof: numbers: tests/routing/papers/test_codebases.py::test_the_gates_of_fastmoe_equal_a_loop_over_tokens,
  tests/routing/papers/test_codebases.py::test_fastmoe_s_switch_loss_counts_surviving_tokens,
  tests/routing/papers/test_codebases.py::test_faster_sends_few_tokens_to_other_nodes,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[fastmoe]
Differs: in the code a second expert dropped at random has already taken a slot; here it is dropped before capacity, as
  in GShard. Its kernel assigns slots with atomic operations, in undefined order; here by token. With several workers
  its loss has the squared number of experts of a worker in place of E^2; here it is the loss of one worker. Its experts
  are initialised like torch's linear layers, here with fan-in truncated normals; the gate as in torch here too.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=288, activation='gelu', use_bias=True),
      router=papers.fastmoe(gate='gshard'), dispatch=dict(name='gather'), group='batch')
  return config
