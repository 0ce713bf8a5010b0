"""Features: what the score sees of a token.

    token.py      the activations
    ids.py        ids of tokens, positions, documents and tasks
    bigrams.py    a hash of two ids
    task.py       a learned embedding of the task
    sentence.py   the mean over a document
"""
from moejax.routing.features import bigrams, ids, sentence, task, token
