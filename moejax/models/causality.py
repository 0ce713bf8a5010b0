"""Checks that the routers of a decoder do not see later tokens."""
from collections.abc import Mapping
from typing import Literal

from moejax.config import ConfigError
from moejax.layers.transformer import Transformer
from moejax.routing.plans import Leak

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


def check(transformer: Transformer, accepted: RoutingLeak) -> None:
  """Checks the blocks of a decoder, in training and in evaluation.

  Raises:
    ConfigError: a router leaks more than `accepted`.
  """
  for block in transformer.distinct_blocks():
    for train in (True, False):
      for where, leak in block.leaks(train).items():
        refuse(leak, f'{where}.router', train, accepted)


def refuse(leak: Leak, where: str, train: bool, accepted: RoutingLeak) -> None:
  """Raises ConfigError if `leak`, of the router at `where`, is more than `accepted`."""
  fine = {'refuse': ('causal',), 'slots': ('causal', 'slots'), 'train': ('causal',),
          'oracle': ('causal', 'slots', 'future')}[accepted]
  if leak not in fine and not (train and accepted == 'train'):
    raise ConfigError(f'{where} cannot be used in a decoder: in {"training" if train else "evaluation"} it '
                      f'{_WHY[leak]}. {_REMEDY[leak]}')


def check_cache(transformer: Transformer) -> None:
  """Checks that the blocks of a decoder can be applied to the tokens of a row in parts. Raises ConfigError."""
  for block in transformer.distinct_blocks():
    refuse_cache(block.leaks(False))


def refuse_cache(leaks: Mapping[str, Leak]) -> None:
  """Raises ConfigError if a mixture of `leaks`, by config path, routes by later tokens, as 'oracle' accepts."""
  for where, leak in leaks.items():
    if leak == 'future':
      raise ConfigError(f'{where}.router cannot be used with a cache: in evaluation it {_WHY[leak]}, and a cache is for '
                        'tokens whose followers are not known yet. Apply the model to whole sequences, or use another '
                        'router.')
