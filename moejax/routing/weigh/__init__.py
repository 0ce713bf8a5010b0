"""Weightings: the combine weights of the selected experts.

    softmax.py       over all experts or the selected ones; renormalised or not
    sigmoid.py       experts do not compete
    one.py           no weight
    as_scored.py     the scores themselves
    hierarchical.py  products of two levels of gates
"""
from moejax.routing.weigh import as_scored, hierarchical, one, sigmoid, softmax
