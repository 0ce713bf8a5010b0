"""The learning problem of "Towards Understanding MoE" (2208.02813) on its own data: cubic or linear experts.

`python -m experiments.paper_effects.programs.clusters --variant=nonlinear --seed=0 --out=FOLDER` trains on 4,000
examples at once for 500 steps, or until the loss is 0.314, close to its least value of log(1 + 1/e) = 0.3133. It writes
`test/accuracy` and `test/dispatch_entropy`: what an expert's examples leave open about their cluster, in nats.
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.paper_effects.programs import command
from moejax import models
from moejax.data.cluster_patches import cluster_patches
from moejax.random import derive
from moejax.routing import papers
from moejax.training import objectives, optimizer

ACTIVATIONS = dict(nonlinear='cubic', linear='linear')
EXAMPLES, STEPS, ENOUGH = 4000, 500, 0.314


def images(patches: np.ndarray) -> jax.Array:
  """<float32>[N,4,50] as images of 10x10 pixels with 2 channels, whose patches of 5x5 they are."""
  tiles = patches.reshape(-1, 2, 2, 5, 5, 2).swapaxes(2, 3)
  return jnp.asarray(tiles.reshape(-1, 10, 10, 2))


def dispatch_entropy(expert: np.ndarray, cluster: np.ndarray) -> float:
  """`sum_e n_e / n * H(cluster | expert e)` in nats; <int>[N] each. 0 where experts see one cluster each."""
  counts = np.zeros((expert.max() + 1, cluster.max() + 1))
  np.add.at(counts, (expert, cluster), 1)
  sums = counts.sum(1, keepdims=True)
  share = np.divide(counts, sums, out=np.ones_like(counts), where=counts > 0)
  return float(-(counts * np.log(share)).sum() / len(expert))


def measure(variant: str, seed: int) -> dict[str, float]:
  """The metrics of one run."""
  generator = np.random.default_rng(seed)
  basis = np.linalg.qr(generator.normal(size=(50, 50)))[0][:8]
  # Setting 1 of the paper.
  (train_set, label, _), (test_set, test_label, cluster) = (
      cluster_patches(EXAMPLES, basis, generator, noise=1., decoy=3.) for _ in range(2))
  model = models.build(dict(
      name='patch_mixture', image_size=10, channels=2, patch_size=5, num_classes=2, moe=dict(
          num_experts=8, experts=dict(filters=8, activation=ACTIVATIONS[variant]),
          router=papers.understanding_moe())))
  descent = optimizer.build(dict(name='normalized_sgd', others=100., schedule=dict(name='constant', peak=1e-3)),
                            'config.optimizer', model=model, steps=STEPS).transform
  objective = objectives.build(dict(name='classification'), 'config.objective')
  batch = dict(image=images(train_set), label=jnp.asarray(label), valid=jnp.ones(EXAMPLES, bool))
  key = jax.random.key(seed)
  params, _ = model.init(derive(key, 'init'))

  @jax.jit
  def step(params, state, key):
    def loss(params):
      return objective(model.apply(params, {}, batch, key=key, train=True), batch)[0]
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = descent.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  state, steps = descent.init(params), 0
  for steps in range(1, STEPS + 1):
    params, state, value = step(params, state, derive(key, steps))
    if value < ENOUGH:
      break
  out = jax.jit(lambda params, image: model.apply(params, {}, dict(image=image)))(params, images(test_set))
  expert = np.asarray(out.routers['block_00'].plan.expert).ravel()
  return {'step': steps, 'train/loss': float(value),
          'test/accuracy': float((np.asarray(out.logits).argmax(-1) == test_label).mean()),
          'test/dispatch_entropy': dispatch_entropy(expert, cluster)}


if __name__ == '__main__':
  command.main(measure, ACTIVATIONS)
