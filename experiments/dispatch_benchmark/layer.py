"""The JAX programs: moejax's sparse layer by each dispatcher, and the dense floor. A process of the benchmark."""
import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dispatch_benchmark import peers
from experiments.dispatch_benchmark.programs import Program
from moejax import functional, kernels
from moejax.config import call
from moejax.experts import EXPERTS, Expert
from moejax.kernels.expert_block import activate
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers

GROUP = 512  # tokens per group of einsum, whose cost grows with the group size
CAPACITY_FACTOR = 1.25
CAPACITY = dict(place=dict(name='capacity', capacity_factor=CAPACITY_FACTOR))

# Keys of `config.moe` for each kind of layer, besides the common ones.
LAYERS = {
    'einsum': dict(dispatch=dict(name='einsum'), router=CAPACITY, group=GROUP),
    'gather': dict(dispatch=dict(name='gather'), router=CAPACITY),
    'grouped': dict(dispatch=dict(name='grouped', implementation='xla')),
    'capacity': dict(dispatch=dict(name='grouped', implementation='xla'), router=CAPACITY),
    'ragged_dot': dict(dispatch=dict(name='grouped', implementation='ragged_dot')),
    'tokamax': dict(dispatch=dict(name='grouped', implementation='tokamax')),
    'routing': dict(dispatch=dict(name='grouped'), experts=dict(name='unchanged')),
}


@EXPERTS('unchanged')
class Unchanged(Expert):
  """Experts that return their rows, which leaves a layer's router, a sort and two permutations."""

  def __call__(self, rows, layout, *, key=None, train=False):
    """rows: <float>[M,D] -> the same."""
    # Real experts read and write rows in memory; without this, XLA would fuse the code before and after them.
    return jax.lax.optimization_barrier(rows)


def build(program: Program):
  """Compiles `program`; returns a function that runs it and returns its outputs, and its bytes besides arguments."""
  function, variables, constants = _function(program)
  target = jax.random.normal(jax.random.key(2), (program.tokens, program.dim))

  def loss(variables, constants, target):
    return jnp.vdot(function(variables, constants).reshape(target.shape), target)

  # The loss is an output too: without it, XLA would remove the end of the forward pass.
  run = jax.value_and_grad(loss) if program.backward else lambda variables, constants, _: function(variables, constants)
  compiled = jax.jit(run).lower(variables, constants, target).compile()
  memory = compiled.memory_analysis()
  return (lambda: jax.block_until_ready(compiled(variables, constants, target)),
          dict(temporary_bytes=memory.temp_size_in_bytes,
               peak_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes))


def routes(load: str, tokens: int, num_experts: int, choices: int, seed: int = 0) -> kernels.Routes:
  """Routes of `tokens`, each to `choices` different experts.

  Args:
    load: 'balanced': all experts equally; 'multinomial': uniformly random; 'zipf': random with probability 1/rank.
    tokens: T.
    num_experts: E.
    choices: K.
    seed: seed of the draws.
  """
  random = np.random.default_rng(seed)
  if load == 'balanced':
    expert = random.permutation(np.arange(tokens * choices).reshape(tokens, choices) % num_experts)
  else:
    preference = -np.log(np.arange(1, num_experts + 1)) * (load == 'zipf')
    # The k largest of log-probability + Gumbel noise are k draws without replacement.
    expert = np.argsort(-(preference + random.gumbel(size=(tokens, num_experts))))[:, :choices]
  order = np.argsort(expert.reshape(-1), kind='stable')
  position = np.argsort(order).reshape(tokens, choices)
  return kernels.Routes(jnp.asarray(order // choices, jnp.int32), jnp.full(order.size, 1 / choices),
                        jnp.bincount(expert.reshape(-1), length=num_experts), jnp.asarray(position, jnp.int32))


def _function(program):
  # The function (variables, constants) -> <float>[T,D] and its arguments; gradients are taken for the variables.
  x = jax.random.normal(jax.random.key(1), (1, program.tokens, program.dim))
  if program.what in LAYERS:
    layer = functional.functionalize(functools.partial(_layer, program), MoE.mix)
    params = _params(program.num_experts, program.dim, program.hidden, program.activation)
    params = {name: params[name] for name in layer.shapes()[0]}
    return (lambda variables, state: layer.apply(variables[0], state, variables[1])[0]), (params, x), {}
  weights = kernels.Weights(**_params(program.num_experts, program.dim, program.hidden, program.activation)['experts'])
  if program.what == 'dense':
    return functools.partial(_dense, program), (weights, x[0]), ()
  given = routes(program.load, program.tokens, program.num_experts, program.choices)

  def block(variables, given):
    weights, x, weight = variables
    return kernels.expert_block(x, weights, given._replace(weight=weight), activation=program.activation,
                                implementation='xla')

  return block, (weights, x[0], given.weight), given


def _dense(program, variables, _):
  # A feed-forward on K copies of every token: the same number of multiplications as the experts.
  weights, x = variables
  rows = jnp.concatenate([x] * program.choices)
  gate = None if weights.wg is None else rows @ weights.wg[0]
  y = activate(program.activation, rows @ weights.wi[0], gate) @ weights.wo[0]
  return y.reshape(program.choices, *x.shape).sum(0)


def _layer(program, rngs):
  kind = LAYERS[program.what]
  router = {**papers.top_k_dropless(k=program.choices), 'balance': {}, **kind.get('router', {})}
  if program.choices == 1:
    router['weigh'] = dict(name='one')  # weights of equal shares, which sum to 1
  config = dict(num_experts=program.num_experts, group=min(kind.get('group', program.tokens), program.tokens),
                dispatch=kind['dispatch'], router=router, experts=kind.get('experts', dict(
                    name='feed_forward', hidden=program.hidden, activation=program.activation)))
  return call(MoE, config, program.what, dim=program.dim, dtype=jnp.float32, rngs=rngs)


@functools.cache
def _params(num_experts, dim, hidden, activation):
  # Shared by all programs of the shape.
  program = Program('grouped', False, num_experts, 1, 1, dim, hidden, activation)
  return functional.functionalize(functools.partial(_layer, program)).init(jax.random.key(0))[0]


if __name__ == '__main__':
  peers.serve(build, dict(python=platform.python_version(), jax=jax.__version__))
