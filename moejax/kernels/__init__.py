"""Numerical kernels: two functions with several implementations.

    grouped_matmul(x, w, group_sizes)        consecutive groups of rows, each times its own matrix
    expert_block(x, weights, routes, ...)    gather, matmul, activation, matmul, weighted sum: a layer of experts
    explain(shape, ...)                      which implementation runs here, why, and what would be faster

`implementation=` names one of `choice.MODULES`.
"""
from moejax.kernels.choice import CannotRun, Name, Shape, explain
from moejax.kernels.expert_block import expert_block
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.routes import Routes, Weights

__all__ = ['CannotRun', 'Name', 'Routes', 'Shape', 'Weights', 'expert_block', 'explain', 'grouped_matmul']
