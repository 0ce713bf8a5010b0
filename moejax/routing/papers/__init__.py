"""Papers: functions that return the router config of a paper, with its hyperparameters as defaults.

    router=papers.vmoe(k=2)

A fragment is a plain dict of the six stages, so any key can be overridden, and any stage swapped for another paper's. A
new paper is one file here, with the stages it introduces. The decorator `paper` declares the router's properties;
`tests/routing/test_papers.py` finds it by name and checks them.
"""
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Literal

# The classes of "A Review of Sparse Expert Models" (arXiv 2209.01667), section 3.
#   token:     each token chooses its experts     soft:   all experts see all tokens, or mixtures of them
#   expert:    each expert chooses its tokens     fixed:  by a property known in advance (id, task, position)
#   together:  balanced joint assignment          chance: random
Chooses = Literal['token', 'expert', 'together', 'soft', 'fixed', 'chance']


@dataclasses.dataclass(frozen=True)
class Paper:
  """Properties of a paper's router.

  Attributes:
    fragment: the function, with the paper's hyperparameters as defaults.
    title: title of the paper, or 'Unpublished'.
    arxiv: its arXiv id, or where else it appeared; '' for an unpublished router.
    chooses: the class of routing.
    draws: whether training draws random numbers.
    exchangeable: whether permuting the experts' parameters permutes their tokens and changes nothing else.
    example: arguments for a small router that drops tokens if it can: 4 experts, ids below 11, tasks below 3,
      `shared` of width 5.
    alone: arguments for one expert; None: it needs several.
  """
  fragment: Callable[..., dict[str, Any]]
  title: str
  arxiv: str = ''
  chooses: Chooses = 'token'
  draws: bool = False
  exchangeable: bool = True
  example: dict[str, Any] = dataclasses.field(default_factory=dict)
  alone: dict[str, Any] | None = dataclasses.field(default_factory=dict)


PAPERS: dict[str, Paper] = {}


def paper(title: str, arxiv: str = '', **facts) -> Callable:
  """Decorator of a fragment; `facts` are the other attributes of `Paper`. Your own router: `@paper('Unpublished')`."""
  def register(fragment):
    PAPERS[fragment.__name__] = Paper(fragment, title, arxiv, **facts)
    return fragment
  return register


for _module in pkgutil.iter_modules(__path__):
  importlib.import_module(f'{__name__}.{_module.name}')
globals().update({name: known.fragment for name, known in PAPERS.items()})
__all__ = ['PAPERS', 'Paper', 'paper', *sorted(PAPERS)]
