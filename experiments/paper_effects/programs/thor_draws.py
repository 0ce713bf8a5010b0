"""How much the loss of a THOR model depends on which random experts it is evaluated with.

Writes `spread`, the variance over twelve draws, and `loss`, their mean.
"""
import statistics

import jax

from configs import thor_t5_chitchat
from experiments.paper_effects.programs import command, training

DRAWS = 12
ALPHA = {'alpha 0': 0.0, 'alpha 5': 5.0}


def config(variant: str, seed: int, steps: int = 150):
  """The shipped config, narrow and short."""
  made = thor_t5_chitchat.get_config()
  made.seed, made.method.alpha = seed, ALPHA[variant]
  made.model.update(dim=48)
  for side in (made.model.encoder, made.model.decoder):
    side.feed_forward.hidden = side.moe.experts.hidden = 96
  made.data.update(length=64, batch_size=16)
  made.data.source.test_fraction = 0.003
  made.training.steps = steps
  made.evaluation.evaluators = dict(test=dict(name='seq2seq'))
  return made


def measure(variant: str, seed: int) -> dict[str, float]:
  """Trains, and evaluates with other draws of the experts each time."""
  built, state = training.trained(config(variant, seed), seed)
  losses = []
  for draw in range(DRAWS):
    # All that the routers remember is a number that their draws follow from.
    other = jax.tree.map(lambda number: number + draw, state.router_state)
    losses.append(built.evaluators['test'](state.params, other)['loss'])
  return dict(step=built.training.steps, spread=statistics.variance(losses), loss=statistics.mean(losses))


if __name__ == '__main__':
  command.main(measure, ALPHA)
