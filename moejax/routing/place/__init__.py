"""Placements: how many slots an expert has, and which choices get them.

    dropless.py           all choices are computed
    capacity.py           C slots per expert and group
    document_capacity.py  C slots per expert and document
    two_levels.py         slots of groups of experts, then of the experts
    retry.py              tokens of a full expert try their next best
    straight_through.py   a capacity with a gradient through dispatch

`conventions.py` has the formulas for C, `queues.py` who is first.
"""
from moejax.routing.place import capacity, document_capacity, dropless, retry, straight_through, two_levels
