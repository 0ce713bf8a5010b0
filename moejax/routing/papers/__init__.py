"""Papers: functions that return the router config of a paper, with its hyperparameters as defaults.

    router=papers.vmoe(k=2)

A fragment is a plain dict of the six stages, so any key can be overridden, and any stage swapped for another paper's. A
new paper is one file here, with the stages it introduces, and a line at the end of this one. The decorator `paper`
declares the router's properties; `tests/routing/papers/test_papers.py` finds it by name and checks them.
"""
import dataclasses
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


# After `paper`, which they import.
from moejax.routing.papers.base import base
from moejax.routing.papers.capped_expert_choice import capped_expert_choice
from moejax.routing.papers.comet import comet
from moejax.routing.papers.cross_task import cross_task
from moejax.routing.papers.deepspeed import deepspeed
from moejax.routing.papers.demix import demix
from moejax.routing.papers.dselect_k import dselect_k
from moejax.routing.papers.expert_choice import expert_choice
from moejax.routing.papers.fairseq import fairseq
from moejax.routing.papers.fastmoe import fastmoe
from moejax.routing.papers.fastmoe_swipe import fastmoe_swipe
from moejax.routing.papers.glam import glam
from moejax.routing.papers.gmoe import gmoe
from moejax.routing.papers.gshard import gshard
from moejax.routing.papers.hash_layers import hash_layers, multi_hash
from moejax.routing.papers.hierarchical import hierarchical, moe_2d
from moejax.routing.papers.limoe import limoe
from moejax.routing.papers.loss_free import loss_free
from moejax.routing.papers.lucidrains import lucidrains
from moejax.routing.papers.mtf_expert_choice import mtf_expert_choice
from moejax.routing.papers.rl_routing import rl_routing
from moejax.routing.papers.s_base import s_base
from moejax.routing.papers.soft_moe import soft_moe
from moejax.routing.papers.sparse_ot import sparse_ot, sparse_ot_tokens
from moejax.routing.papers.sparsely_gated import sparsely_gated
from moejax.routing.papers.speech_moe import speech_moe
from moejax.routing.papers.st_moe import st_moe
from moejax.routing.papers.stable_moe import stable_moe
from moejax.routing.papers.strictly_balanced import strictly_balanced
from moejax.routing.papers.switch import switch
from moejax.routing.papers.task_aware import task_aware
from moejax.routing.papers.task_moe import task_moe
from moejax.routing.papers.thor import thor
from moejax.routing.papers.top_k_dropless import top_k_dropless
from moejax.routing.papers.understanding_moe import understanding_moe
from moejax.routing.papers.vmoe import vmoe
from moejax.routing.papers.widenet import widenet
from moejax.routing.papers.xmoe import xmoe

__all__ = ['PAPERS', 'Paper', 'paper', 'base', 'capped_expert_choice', 'comet', 'cross_task', 'deepspeed', 'demix',
           'dselect_k', 'expert_choice', 'fairseq', 'fastmoe', 'fastmoe_swipe', 'glam', 'gmoe', 'gshard', 'hash_layers',
           'hierarchical', 'limoe', 'loss_free', 'lucidrains', 'moe_2d', 'mtf_expert_choice', 'multi_hash',
           'rl_routing', 's_base', 'soft_moe', 'sparse_ot', 'sparse_ot_tokens', 'sparsely_gated', 'speech_moe',
           'st_moe', 'stable_moe', 'strictly_balanced', 'switch', 'task_aware', 'task_moe', 'thor', 'top_k_dropless',
           'understanding_moe', 'vmoe', 'widenet', 'xmoe']
