"""Moving tokens to their experts, and summing what comes back: four ways to execute a plan.

    name       runs                                          cost of moving tokens
    reference  every plan                                    every expert sees every token; float32
    einsum     SoftPlan, SlotPlan, TokenPlan with capacity   products with one-hot tensors [G,S,E,C]
    gather     SlotPlan, TokenPlan with capacity             reads of rows into buffers [E,G*C,D]
    grouped    TokenPlan with or without capacity, SlotPlan  one sort, then a grouped matmul over [T*K,D]

and, for experts that come in segments (MultiHash layers), `segments`.

All give the same outputs and gradients, dropout included: each (token, expert) draws its own dropout mask.
"""
from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher, build
from moejax.dispatch.einsum import Einsum
from moejax.dispatch.gather import Gather
from moejax.dispatch.grouped import Grouped
from moejax.dispatch.reference import Reference
from moejax.dispatch.segments import Segments

__all__ = ['DISPATCHERS', 'Dispatcher', 'build', 'Einsum', 'Gather', 'Grouped', 'Reference', 'Segments']
