"""Every key of data has a line in its class's docstring that says what it means."""
import inspect
import re

import pytest

from moejax.data import PIPELINES, SOURCES, TOKENIZERS
from moejax.data.augment import AUGMENTATIONS


@pytest.mark.parametrize('constructor', [registry[name] for registry in (PIPELINES, SOURCES, TOKENIZERS, AUGMENTATIONS)
                                         for name in registry], ids=lambda constructor: constructor.__name__)
def test_every_key_has_a_line(constructor):
  lines = [line for base in constructor.__mro__ for line in (base.__doc__ or '').splitlines()]
  explained = {key for line in lines if (entry := re.match(r' +([\w, ]+): \S', line)) for key in entry[1].split(', ')}
  keys = set(inspect.signature(constructor).parameters) - {'where'}
  assert keys <= explained
  assert constructor.__doc__ and not constructor.__doc__.startswith(f'{constructor.__name__}(')
