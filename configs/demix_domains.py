"""DEMix on three domains of text: every feed-forward is one expert a domain.

System: DEMix
Paper: Gururangan et al. 2021, "DEMix Layers" (arXiv 2108.05036), section 3; section 4 at test time: the experts of the
  document's domain, or a posterior mixture of all that is not told the domain; section 5: domains are added and taken
  out with `moejax.surgery.add_domain`.
Data: dialogues, Python's standard library and English prose, that `pip install 'moejax[data]'` brings.
Command: python -m moejax.train --config=configs/demix_domains.py --workdir=runs/demix_domains
Cost: about three minutes on 2 CPU cores.
Result: Expected: a lower perplexity than configs/dense_domains.py in every domain; the posterior mixture close to that
  of the dense model. Of models half as wide, after 200 steps: 11.0 told the domain, 11.5 the posterior, 11.5 dense.
Proof: identities: tests/evaluation/test_domains.py::test_bayes_is_never_worse_than_one_expert_by_more_than_its_prior,
  tests/routing/test_task_routing.py::test_the_gradient_of_a_demix_expert_is_that_of_its_own_domain_alone,
  tests/surgery/test_add_domain.py::test_training_on_the_new_domain_leaves_the_logits_of_all_others_bit_for_bit
Differs: the published code starts every document from equal weights and knows the last token alone; so does
  evidence='previous_token'. Its updating prior is computed but not used; here it is used. Its groups of devices, one a
  domain, are batches balanced over domains here, with the same gradients.
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
