"""Dispatch: moving tokens to their experts and combining the outputs; four ways to execute a plan.

    name       supports                                      cost of moving tokens
    reference  every plan                                    every expert computes every token; float32
    einsum     SoftPlan, SlotPlan, TokenPlan with capacity   products with one-hot tensors [G,S,E,C]
    gather     SlotPlan, TokenPlan with capacity             gathers rows into buffers [E,G*C,D]
    grouped    TokenPlan with or without capacity, SlotPlan  one sort, then a grouped matmul over [T*K,D]

and `segments` for experts in segments (MultiHash layers).

All give the same outputs and gradients, dropout included: each (token, expert) draws its own dropout mask.
"""
from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher, build
from moejax.dispatch.einsum import Einsum
from moejax.dispatch.gather import Gather
from moejax.dispatch.grouped import Grouped
from moejax.dispatch.reference import Reference
from moejax.dispatch.segments import SegmentDispatch

__all__ = ['DISPATCHERS', 'Dispatcher', 'build', 'Einsum', 'Gather', 'Grouped', 'Reference', 'SegmentDispatch']
