"""Papers: functions that return the router config of a paper, with its numbers as defaults.

    router=papers.vmoe(k=2)

A fragment is a plain dict of the six stages, so any key of it can be overridden, and any stage be swapped for another
paper's. A new paper is one file here, a test case, and what is new in it in the room it belongs to.
"""
from moejax.routing.papers.expert_choice import expert_choice
from moejax.routing.papers.gshard import gshard
from moejax.routing.papers.hash_layers import hash_layers
from moejax.routing.papers.loss_free import loss_free
from moejax.routing.papers.soft_moe import soft_moe
from moejax.routing.papers.st_moe import st_moe
from moejax.routing.papers.switch import switch
from moejax.routing.papers.top_k_dropless import top_k_dropless
from moejax.routing.papers.vmoe import vmoe

__all__ = ['expert_choice', 'gshard', 'hash_layers', 'loss_free', 'soft_moe', 'st_moe', 'switch', 'top_k_dropless',
           'vmoe']
