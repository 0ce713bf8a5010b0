"""How routes and representations of one inserted mixture move and collapse in training, by router."""
import jax
import jax.numpy as jnp
import numpy as np

from configs import stable_moe_chitchat, xmoe_chitchat
from experiments.paper_effects.programs import command, training

VARIANTS = ('stable', 'greedy', 'cosine', 'dot')
STEPS = 300


def measure(variant: str, seed: int) -> dict[str, float]:
  """Fluctuation: the share of held-out bytes, routed as training routes them, that change their expert between step
  100 and the end. Rank: the exponential of the entropy of the squared singular values of what the mixture sees.
  """
  routes, built, state = {}, None, None
  for step, (built, state) in enumerate(training.train(config_of(variant), seed)):
    if step in (STEPS // 3, STEPS):
      routes[step], features = seen(built, state)
  values = np.linalg.svd(features - features.mean(0), compute_uv=False)**2
  share = values / values.sum()
  fluctuation = np.mean(routes[STEPS // 3] != routes[STEPS])
  return dict(fluctuation=fluctuation, rank=np.exp(-np.sum(share * np.log(share + 1e-12))))


def seen(built, state):
  """The expert of each held-out byte, and the features that the model makes of it, <float>[T,D]."""
  batch = next(iter(built.pipeline.evaluate('test')))
  output = jax.jit(lambda batch: built.model.apply(state.params, state.router_state, batch, key=jax.random.key(0),
                                                   train=True))(batch)
  [router] = output.routers.values()
  valid = np.asarray(batch['segments']).reshape(-1) > 0
  expert = np.asarray(router.plan.expert[..., 0]).reshape(-1)[valid]
  return expert, np.asarray(jnp.reshape(output.features, (-1, output.features.shape[-1])))[valid]


def config_of(variant: str):
  """'stable' and 'greedy' are StableMoE with and without stage 2; 'cosine' and 'dot' X-MoE, and without its sphere."""
  config = (stable_moe_chitchat if variant in ('stable', 'greedy') else xmoe_chitchat).get_config()
  training.shrink(config, STEPS)
  score = config.model.moe.router.score
  if variant in ('stable', 'greedy'):
    score.stage_1_steps = STEPS // 10 if variant == 'stable' else 10 * STEPS
  if variant == 'dot':
    score.update(normalize='none', temperature='none')
    score.project = None
  return config


if __name__ == '__main__':
  command.main(measure, VARIANTS)
