"""Papers: functions that return the router config of a paper, with its numbers as defaults.

    router=papers.vmoe(k=2)

A fragment is a plain dict of the six stages, so any key of it can be overridden, and any stage be swapped for another
paper's. A new paper is one file here, with whatever stage is new in it. The decorator `paper` says what the router is
like; `tests/routing/test_papers.py` finds it by name and holds it to that.
"""
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Literal

# The columns of "A Review of Sparse Expert Models" (arXiv 2209.01667), section 3: who chooses whom.
#   token:     each token its experts             soft:   nobody; all experts see tokens, or mixtures of them
#   expert:    each expert its tokens             fixed:  what is known of a token beforehand (id, task, position)
#   together:  all tokens and experts, balanced   chance: nobody; a draw
Chooses = Literal['token', 'expert', 'together', 'soft', 'fixed', 'chance']


@dataclasses.dataclass(frozen=True)
class Paper:
  """What a paper's router is like.

  Attributes:
    fragment: the function, with the paper's numbers as defaults.
    title: of the paper.
    arxiv: its id there, or where else it appeared.
    chooses: who chooses whom.
    draws: whether training draws random numbers.
    exchangeable: whether permuting the experts' parameters permutes their tokens and changes nothing else.
    example: arguments with which it is small and drops tokens where it can: 4 experts, ids below 11, tasks below 3,
      `shared` of width 5.
    alone: arguments for one expert, or None: it needs several.
  """
  fragment: Callable[..., dict[str, Any]]
  title: str
  arxiv: str
  chooses: Chooses = 'token'
  draws: bool = False
  exchangeable: bool = True
  example: dict[str, Any] = dataclasses.field(default_factory=dict)
  alone: dict[str, Any] | None = dataclasses.field(default_factory=dict)


PAPERS: dict[str, Paper] = {}


def paper(title: str, arxiv: str, **facts) -> Callable:
  """Decorator of a fragment; `facts` are the further attributes of `Paper`."""
  def register(fragment):
    PAPERS[fragment.__name__] = Paper(fragment, title, arxiv, **facts)
    return fragment
  return register


for _module in pkgutil.iter_modules(__path__):
  importlib.import_module(f'{__name__}.{_module.name}')
globals().update({name: known.fragment for name, known in PAPERS.items()})
__all__ = ['PAPERS', 'Paper', 'paper', *sorted(PAPERS)]
