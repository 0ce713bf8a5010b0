"""One training step of small models: results must not depend on the number of devices and processes.

As a program, `agreement_cases.py --cases=<json> --folder=<path>`, it is one of several processes, and the first writes
what came out.
"""
import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax import command_line
from moejax.functional import flatten, unflatten
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import processes
from moejax.routing import papers
from moejax.training import step
from moejax.training.durability import spikes
from moejax.training.setup import default_config, prepare
from moejax.training.step import TrainState

STEPS = 2


def config_of(name):
  """The run that `name` names, e.g. 'decoder/gather/scan/data=2 expert=2'.

  There is capacity for three quarters of the choices, so that tokens are dropped, and plain gradient descent, so that
  what a parameter moved by is its gradient.
  """
  model, dispatch, stacking, mesh = name.split('/')
  config = default_config()
  body = dict(dim=8, num_layers=2, stacking=stacking, attention=dict(heads=2), feed_forward=dict(hidden=8),
              sparse=dict(name='every', n=1), moe=dict(
                  num_experts=4, experts=dict(name='feed_forward', hidden=8), group='sequence',
                  router=papers.gshard(second='all', capacity_factor=0.75), dispatch=dict(name=dispatch)))
  if model == 'vision':
    config.model = dict(name='vision', image_size=8, channels=1, patch_size=4, num_classes=10, **body)
    config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=16,
                       augment=(dict(name='flip'),))
    config.objective = dict(name='classification')
  else:
    config.model = dict(name='decoder', vocab_size=17, routing_leak='slots', **body)
    config.data = dict(name='language_model', length=12, batch_size=16, readers=4,
                       tokenizer=dict(name='ids', num_ids=16), source=dict(
                           name='markov_mixture', document_length=9, train_documents=64, test_documents=8))
    config.objective = dict(name='language_model')
  config.mesh = {axis: int(size) for axis, size in (part.split('=') for part in mesh.split())}
  config.optimizer = dict(name='sgd', schedule=dict(name='constant', peak=1.))
  config.training.steps = STEPS
  return config


def take_steps(name):
  """(metrics of each step, parameters after the last), as numpy."""
  setup = prepare(config_of(name))
  state = first_state(setup)
  train_step = processes.compiled(step.make_train_step(setup), state, setup.pipeline.batch_spec())
  batches = setup.pipeline.train(setup.seed, setup.rows)
  rows = []
  for _ in range(STEPS):
    state, metrics = train_step(state, setup.place(next(batches)))
    rows.append({name: np.asarray(value).tolist() for name, value in metrics.items()})
  return rows, {path: fetch(leaf) for path, leaf in flatten(state.params).items()}


def first_state(setup):
  """Drawn here: the program of the model's own initialisers would cost more to compile than all that is tested."""
  draw = np.random.default_rng(0)
  params, router_state = setup.model.shapes()
  params = {path: draw.normal(1. if path.endswith('scale') else 0., 0.4, leaf.shape).astype(np.float32)
            for path, leaf in flatten(params).items()}
  zeros = lambda tree: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
  opt_state = zeros(jax.eval_shape(setup.optimizer.transform.init, setup.model.shapes()[0]))
  state = TrainState(np.int32(0), unflatten(params), zeros(router_state), opt_state, zeros(spikes.initial()))
  return processes.spread(state, step.state_shardings(setup))


def agree():
  """Communication of the processes, and a batch on a mesh whose neighbours are in different processes."""
  index, count = jax.process_index(), jax.process_count()
  mesh = mesh_lib.build({}, devices=np.asarray(jax.devices()).reshape(count, -1).T.ravel())
  rows = processes.local_rows(mesh, 16)
  before = processes.LargestBefore()
  try:
    with processes.together('count to three'):
      if index == 0:
        raise KeyError('three')
  except (KeyError, RuntimeError) as error:
    failure = str(error)
  return dict(rows=rows.tolist(), placed=fetch(processes.place(mesh, {'x': 10 * rows})['x']).tolist(),
              largest=processes.largest(7 + index), before=[before(index), before(0), before(0)],
              union=processes.union({'all': [1], str(index): 'x' * 9 ** index}), failure=failure)


def fetch(x):
  return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def main():
  flags = command_line.Parser('agreement_cases', __doc__)
  flags.add_argument('--cases', help='their names, as JSON')
  flags.add_argument('--folder', help='where to write')
  flags.add_processes()
  given = flags.parse()
  command_line.start_processes(given)
  with open(f'{given.folder}/{jax.process_index()}.json', 'w') as file:
    json.dump(agree(), file)
  for number, name in enumerate(json.loads(given.cases)):
    metrics, params = take_steps(name)
    path = f'{given.folder}/{number}-{jax.process_index()}'
    with open(f'{path}.json', 'w') as file:
      json.dump(metrics, file)
    if jax.process_index() == 0:
      np.savez(f'{path}.npz', **params)


if __name__ == '__main__':
  main()
