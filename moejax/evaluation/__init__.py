"""Evaluators: measurements of a model, built by name from `config.evaluation.evaluators`."""
from moejax.evaluation import domains, few_shot, images, pairs, speech, text
from moejax.evaluation.registry import EVALUATORS, Evaluator, build, measure

__all__ = ['EVALUATORS', 'Evaluator', 'build', 'measure']
