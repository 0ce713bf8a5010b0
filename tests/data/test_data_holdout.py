"""Impossible test splits: the error names the key, the files and a remedy."""
import pytest

from moejax.config import ConfigError
from moejax.data import SOURCES, DataError


def build(**config):
  return SOURCES.build(config, 'config.data.source')


@pytest.mark.parametrize('documents, fraction, sentence', [
    (5, 0.05, 'config.data.source.test_fraction = 0.05 holds out 0 of 5 examples'),
    (5, 0.95, 'holds out 5 of 5 examples'), (1, 0.5, 'holds out 0 of 1 examples'),
    (0, 0.5, 'holds out 0 of 0 examples')])
def test_a_share_that_leaves_a_split_empty_is_refused_with_a_remedy(tmp_path, documents, fraction, sentence):
  (tmp_path / 'a.txt').write_text('x\n' * documents)
  path = str(tmp_path / '*.txt')
  with pytest.raises(DataError) as error:
    build(name='text', files=path, document='line', test_fraction=fraction).open('train')
  assert sentence in str(error.value) and f'config.data.source.files is {path!r}' in str(error.value)
  assert ('Hold out 1 to 4 of them' if documents > 1 else 'At least two examples are needed') in str(error.value)
  assert 'dict(train=..., test=...)' in str(error.value)


@pytest.mark.parametrize('name', ['digits', 'digits_with_captions', 'rotated_digits'])
def test_more_test_examples_than_there_are_examples_are_refused(name):
  with pytest.raises(DataError, match='config.data.source.test_examples = 1797 holds out 1797 of 1797 examples.*'
                                      'Hold out 1 to 1796 of them'):
    build(name=name, test_examples=1797).open('test')


@pytest.mark.parametrize('fraction', [0., 1., 1.5, -0.1, 1])
def test_an_invalid_share_is_refused_before_a_file_is_opened(fraction):
  for name in ('text', 'jsonl', 'chitchat', 'python_library', 'python_prose'):
    files = dict(files='/none') if name in ('text', 'jsonl') else {}
    with pytest.raises(ConfigError, match='config.data.source.test_fraction must be a float above 0 and below 1'):
      build(name=name, test_fraction=fraction, **files)
