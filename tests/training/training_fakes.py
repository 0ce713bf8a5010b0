"""A tiny model and in-memory batches, with the interfaces of the real ones; and the set-up of a run."""
import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moejax import functional
from moejax.config import call
from moejax.models.output import ModelOutput
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.random import derive
from moejax.routing.router import RouterOutput
from moejax.training import initial, methods, objectives, optimizer, setup
from moejax.training.durability.checkpoint import CheckpointConfig
from moejax.training.durability.recovery import RecoveryConfig
from moejax.training.profile import ProfileConfig

FEATURES, HIDDEN, EXPERTS, CLASSES, BATCH = 3, 8, 4, 5, 16


def moving_load(old, load):
  return 0.9 * old + 0.1 * load / jnp.maximum(load.sum(), 1)


class TinyModel(nnx.Module):
  """A soft mixture over E experts with noise on its input, a balance loss, and a moving load as router state."""

  def __init__(self, rngs, noise=0.1, balance=0.1):
    self.noise, self.balance = noise, balance
    normal = nnx.initializers.normal(0.5)
    self.router = functional.parameter(rngs, normal, (FEATURES, EXPERTS), ('embed', 'expert'))
    self.wi = functional.parameter(rngs, normal, (EXPERTS, FEATURES, HIDDEN), ('expert', 'embed', 'mlp'))
    self.bias = functional.parameter(rngs, nnx.initializers.zeros, (EXPERTS, HIDDEN), ('expert', 'mlp'))
    self.head = functional.parameter(rngs, normal, (HIDDEN, CLASSES), ('mlp', None))
    self.load = functional.router_state(jnp.full(EXPERTS, 1 / EXPERTS), ('expert',))

  def __call__(self, batch, *, key=None, train=False):
    x = batch['image'].reshape(len(batch['image']), -1)
    if train:
      x = x + self.noise * jax.random.normal(derive(key, 'noise'), x.shape)
    share = jax.nn.softmax(x @ self.router[...])
    hidden = jnp.tanh(jnp.einsum('bd,edf->bef', x, self.wi[...]) + self.bias[...])
    features = jnp.einsum('bef,be->bf', hidden, share)
    valid = batch.get('valid', jnp.ones(len(x), bool)).astype(jnp.float32)
    load = valid @ share
    mean = load / jnp.maximum(valid.sum(), 1)
    router = RouterOutput(plan=None, losses={'balance': self.balance * EXPERTS * jnp.square(mean).sum()},
                          metrics={'load': mean, 'dropped': jnp.float32(0)}, updates={}, tokens=valid.sum())
    updates = {'load': functional.Statistics(load, moving_load)} if train else {}
    return ModelOutput(features @ self.head[...], features, {'block_01': router}, updates)


class TinyPipeline:
  """64 points in linearly separable classes; the last of each batch of 4 is padding if `padded`."""
  splits = ('train', 'test')

  def __init__(self, batch_size=BATCH, padded=False, poison=()):
    rng = np.random.default_rng(0)
    self.image = rng.normal(size=(64, 1, 1, FEATURES)).astype(np.float32)
    self.label = (self.image.reshape(64, FEATURES) @ rng.normal(size=(FEATURES, CLASSES))).argmax(-1).astype(np.int32)
    self.valid = np.arange(64) % 4 != 3 if padded else np.ones(64, bool)
    self.batch_size, self.poison = batch_size, poison

  def batch_spec(self, batch_size=None):
    size = batch_size or self.batch_size
    return {'image': jax.ShapeDtypeStruct((size, 1, 1, FEATURES), np.float32),
            'label': jax.ShapeDtypeStruct((size,), np.int32), 'valid': jax.ShapeDtypeStruct((size,), bool)}

  def batch(self, number):
    rows = np.random.default_rng(number).permutation(64)[:self.batch_size]
    image = self.image[rows].copy()
    if number in self.poison:
      image[2] = np.nan
    return {'image': image, 'label': self.label[rows], 'valid': self.valid[rows]}

  def train(self, seed, rows=None):
    # Read when asked for, so that tests can tell which step a batch is for.
    nothing_ahead = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.range(10**6).map(lambda n: self._rows(n, rows)).to_iter_dataset(nothing_ahead))

  def _rows(self, number, rows):
    batch = self.batch(number)
    return batch if rows is None else {name: x[rows] for name, x in batch.items()}

  def augment(self, batch, key):
    del key
    return batch

  def fingerprint(self):
    return {'examples': str(len(self.label))}


class StopsAt(TinyPipeline):
  """Calls `act` when batch `number` is read, the one of step `number + 1`."""

  def __init__(self, number, act):
    super().__init__()
    self.number, self.act = number, act

  def batch(self, number):
    if number == self.number:
      self.act()
    return super().batch(number)


def accuracy(pipeline, apply):
  """An evaluator: accuracy over all 64 points."""
  @jax.jit
  def measure(params, router_state):
    output = apply(params, router_state, {'image': pipeline.image})
    return (output.logits.argmax(-1) == pipeline.label).mean()
  return lambda params, router_state: {'accuracy': float(measure(params, router_state))}


MODEL = functional.functionalize(TinyModel)
# The same without parts that depend on the whole batch: its loss is a mean over examples.
EXAMPLEWISE = functional.functionalize(lambda rngs: TinyModel(rngs, noise=0., balance=0.))


def make_setup(devices=1, pipeline=None, objective=None, optimizer_config=None, evaluate=False, model=MODEL,
               **sections):
  """A `Setup` of the tiny parts; `sections` updates training, checkpoint, evaluation, recovery, profile; `loggers`."""
  config = setup.default_config()
  config.optimizer = ConfigDict(optimizer_config or dict(
      name='adamw', weight_decay=0.1, clip=1.0, schedule=dict(name='cosine', peak=0.02, warmup=2)))
  config.objective = ConfigDict(objective or dict(name='classification'))
  config.training.update(dict(steps=8, log_every=1))
  config.checkpoint.every = 2
  config.report.at = 'never'
  config.model, config.data = ConfigDict(), ConfigDict()
  config.loggers = sections.pop('loggers', config.loggers)
  for name, values in sections.items():
    config[name].update(values)
  config = config.copy_and_resolve_references()
  pipeline = pipeline or TinyPipeline()
  training = call(setup.Training, config.training, 'config.training')
  return setup.Setup(
      config=config, seed=config.seed, model=model, pipeline=pipeline, training=training,
      mesh=mesh_lib.build(config.mesh, devices=jax.devices()[:devices]),
      rules=call(rules.build, config.sharding, 'config.sharding'),
      objective=objectives.build(config.objective, 'config.objective'),
      method=methods.METHODS.build(config.method, 'config.method'),
      init=initial.INITS.build(config.init, 'config.init'),
      optimizer=optimizer.build(config.optimizer, 'config.optimizer', model=model, steps=training.steps),
      evaluators={'test': accuracy(pipeline, model.apply)} if evaluate else {},
      evaluation=call(setup.Evaluation, config.evaluation, 'config.evaluation'),
      checkpoint=call(CheckpointConfig, config.checkpoint, 'config.checkpoint'),
      recovery=call(RecoveryConfig, config.recovery, 'config.recovery'),
      report=call(setup.Report, config.report, 'config.report'), loggers=config.loggers,
      profile=call(ProfileConfig, config.profile, 'config.profile'))

