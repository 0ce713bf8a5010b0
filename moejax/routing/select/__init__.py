"""Selections: which expert sees which token.

    top_k.py              tokens choose their k best experts, or sample them
    group_limited.py      within their best groups of experts
    gshard_top_2.py       two, the second by a policy
    thresholded_top_k.py  k, the others than the first by a policy with thresholds
    ranked.py             one, and fallbacks for `place.retry`
    hashed.py             one per hash of the token
    hierarchical.py       groups, then experts in them
    expert_choice.py      experts choose tokens
    dense.py              all tokens to all experts, or mixtures of tokens

`assignment.py` and `optimal_transport.py` assign all tokens of a group jointly; selections in `papers` use them.
"""
from moejax.routing.select import (dense, expert_choice, group_limited, gshard_top_2, hashed, hierarchical, ranked,
                                   thresholded_top_k, top_k)
