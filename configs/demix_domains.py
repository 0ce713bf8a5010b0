"""DEMix on three domains of text: every feed-forward has one expert per domain.

System: DEMix
Paper: Gururangan et al. 2021, "DEMix Layers" (arXiv 2108.05036), section 3; section 4 at test time: the experts of the
  document's domain, or a posterior mixture of all experts for an unknown domain; section 5: domains are added and
  removed with `moejax.surgery.add_domain`.
Data: dialogues, Python's standard library and English prose, installed by `pip install 'moejax[data]'`.
Command: python -m moejax.train --config=configs/demix_domains.py --workdir=runs/demix_domains
Cost: about three minutes on 2 CPU cores.
Result: Expected: a lower perplexity than configs/dense_domains.py in every domain; the posterior mixture close to
  the dense model. For models half as wide, after 200 steps: 11.0 with known domain, 11.5 posterior, 11.5 dense.
Proof: identities: tests/evaluation/test_domains.py::test_bayes_is_never_worse_than_one_expert_by_more_than_its_prior,
  tests/routing/papers/test_demix.py::test_the_gradient_of_a_demix_expert_is_the_mean_over_its_own_domain,
  tests/surgery/test_add_domain.py::test_training_on_the_new_domain_leaves_the_logits_of_all_others_bit_for_bit
Differs: the published code starts every document from equal weights and uses only the last token; so does
  evidence='previous_token'. It computes an updating prior but does not use it; here it is used. Instead of its groups
  of devices, one per domain, there are batches balanced over domains, with the same gradients.
"""
from configs import dense_domains
from moejax.routing import papers


def get_config():
  config = dense_domains.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=3, experts=dict(name='feed_forward', hidden=256, activation='gelu'),
      router=papers.demix(num_domains=3), dispatch=dict(name='grouped'), group='sequence')
  config.optimizer.gradient_scale = dict(parameters='moe/experts/', factor=3.0)
  config.evaluation.evaluators.posterior = dict(name='domains', mixture='posterior')
  return config
