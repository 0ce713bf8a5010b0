"""Sparsely-gated mixture of experts between two LSTMs, on dialogues.

System: Sparsely-gated MoE
Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), section 5.1 and appendix C.1:
  four of 16 experts for each byte, learned noise, importance and load losses, a sigmoid on the mixture's
  output.
Command: python -m moejax.train --config=configs/sparsely_gated_chitchat.py --workdir=runs/sparsely_gated_chitchat
Cost: about three minutes on 2 CPU cores.
Result: Expected: experts evenly used (largest share of choices below 0.15), and the loss of a small LSTM.
Proof: numbers:
  tests/routing/papers/test_sparsely_gated.py::test_prob_in_top_k_is_the_frequency_of_being_chosen_when_one_noise_is_drawn_again,
  tests/routing/papers/test_sparsely_gated.py::test_losses_of_a_case_worked_out_by_hand,
  tests/layers/test_recurrent.py::test_the_lstm_equals_flax,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[sparsely_gated]
Differs: the noise floor of 0.01 follows Tensor2Tensor, not the paper; the loss weights are the paper's 0.1, not
  Tensor2Tensor's 0.01. Smaller than any model of the paper, and over bytes instead of words.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model = dict(
      name='lstm', vocab_size=258, dim=128, dropout=0.1,
      moe=dict(num_experts=16, experts=dict(name='feed_forward', hidden=128, activation='relu', use_bias=True),
               router=papers.sparsely_gated(k=4), dispatch=dict(name='grouped'), group='batch'))
  # The paper uses Adam with 1,000 steps of warm-up and then an inverse square root.
  config.optimizer = dict(name='adamw', b2=0.98, clip=1.0, schedule=dict(name='rsqrt', peak=5e-3, warmup=50))
  return config
