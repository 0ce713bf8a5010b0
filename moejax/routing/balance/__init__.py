"""Balancers: losses and router-state updates that keep the experts evenly used.

    importance.py        imbalance of probabilities, or of weights
    load.py              imbalance of choices, made smooth by noise
    switch.py            the product of load and probability, by six codebases
    z.py                 the size of logits
    bias.py              no loss, but a bias on the selection
    hierarchical.py      losses of two levels of gates
    modality_entropy.py  entropies by modality
    selectors.py         entropies of selectors and permutations

`balance=dict(importance=0.005, bias=dict(rate=1e-3))` names some of them; a number is short for
`dict(coefficient=number)`. Balancers that are not named cost nothing. Losses are means over the routing groups that
have a valid token, and over valid tokens within a group (`valid_tokens.py`); the z-loss is the mean over all valid tokens.
"""
from moejax.routing.balance import bias, hierarchical, importance, load, modality_entropy, selectors, switch, z
