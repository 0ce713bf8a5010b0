"""Checks that the routers of a decoder do not see later tokens."""
from collections.abc import Iterable
from typing import Literal

from flax import nnx

from moejax.config import ConfigError

# 'slots' also accepts routers whose only leak is that later tokens compete for buffer slots, as in published top-2
# decoders; 'train' accepts routers that leak in training only, as in BASE layers. 'oracle' accepts any router, to
# measure the value of routing by the targets (Hash Layers, section 5).
RoutingLeak = Literal['refuse', 'slots', 'train', 'oracle']
_WHY = {
    'future': 'routes each token by looking at later ones, which reveals the targets to the model',
    'slots': "drops a token's second choice when later tokens' first choices fill the expert",
}
_REMEDY = {
    'future': 'Use token choice in order of position (Switch, or any top-k without capacity), or, if only training '
              "leaks, accept it as in published BASE layers: routing_leak='train'.",
    'slots': "Route without capacity or with k=1, or accept it as in published top-2 decoders: routing_leak='slots'.",
}


def check(blocks: Iterable[nnx.Module], where: str, accepted: RoutingLeak):
  """Checks the routers of all sparse `blocks`, in training and in evaluation.

  Raises:
    ConfigError: a router leaks more than `accepted`.
  """
  fine = {'refuse': ('causal',), 'slots': ('causal', 'slots'), 'train': ('causal',),
          'oracle': ('causal', 'slots', 'future')}[accepted]
  for block in blocks:
    for train in (False,) if accepted == 'train' else (True, False):
      leak = 'causal' if block.moe is None else block.moe.router.leak(train)
      if leak not in fine:
        raise ConfigError(f'{where}.moe.router cannot be used in a decoder: in {"training" if train else "evaluation"} '
                          f'it {_WHY[leak]}. {_REMEDY[leak]}')
