"""A decoder predicts the future; its routers must not see it."""
from collections.abc import Iterable
from typing import Literal

from flax import nnx

from moejax.config import ConfigError

# 'slots' accepts routers whose only leak is that later tokens compete for buffer slots, as published top-2 decoders do;
# 'train' those that leak as they like in training and not in evaluation, as BASE layers do. 'oracle' accepts any: a
# model that is shown the answers, to see what routing by them would be worth (Hash Layers, section 5).
RoutingLeak = Literal['refuse', 'slots', 'train', 'oracle']
_WHY = {
    'future': 'routes each token by looking at later ones, so the model would be trained on the answers',
    'slots': "drops a token's lower choices when later tokens' higher choices fill the expert",
}
_REMEDY = {
    'future': 'Use one in which tokens choose their experts, in order (Switch, or any top-k without capacity), or, where '
              "evaluation does not do so, accept it as published BASE layers do: routing_leak='train'.",
    'slots': "Route without capacity or with k=1, or accept it as published top-2 decoders do: routing_leak='slots'.",
}


def check(blocks: Iterable[nnx.Module], where: str, accepted: RoutingLeak):
  """Checks the routers of all sparse `blocks`, in training and in evaluation.

  Raises:
    ConfigError: a router leaks more of the future than `accepted`.
  """
  fine = {'refuse': ('causal',), 'slots': ('causal', 'slots'), 'train': ('causal',),
          'oracle': ('causal', 'slots', 'future')}[accepted]
  for block in blocks:
    for train in (False,) if accepted == 'train' else (True, False):
      leak = 'causal' if block.moe is None else block.moe.router.leak(train)
      if leak not in fine:
        raise ConfigError(f'{where}.moe.router cannot be in a decoder: in {"training" if train else "evaluation"} it '
                          f'{_WHY[leak]}. {_REMEDY[leak]}')
