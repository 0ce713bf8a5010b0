"""Scores: a logit for every token and expert, and the noise on it.

    linear.py        x W, with the noises in common use
    noisy_linear.py  noise of learned size
    cosine.py        cosines of tokens and expert embeddings
    centroids.py     products with orthogonal vectors
    soft_moe.py      a logit per slot
    hierarchical.py  two levels of gates
    hashing.py       fixed experts for every id
    chance.py        random numbers

`smooth_step.py` and `local_search.py` are for differentiable selection (DSelect-k and COMET, in `papers`).
"""
from moejax.routing.score import centroids, chance, cosine, hashing, hierarchical, linear, noisy_linear, soft_moe
