"""Attention's inner function: one meaning, several implementations.

    attend(queries, keys, values, scale=, mask=, ...)     softmax attention
    Mask(query_segments, key_segments, causal=, ...)      which keys a query sees, as data
    explain(queries, keys, values, ...)                   which implementation runs here, and why not the others

`implementation=` names one of `choice.REASONS`, each a module of this package.
"""
from moejax.layers.attend.choice import Name, attend, explain
from moejax.layers.attend.inputs import EMPTY, Mask

__all__ = ['EMPTY', 'Mask', 'Name', 'attend', 'explain']
