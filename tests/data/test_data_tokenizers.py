"""Tokenizers against their own libraries, and against the bytes of the text."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data import TOKENIZERS, DataError
from moejax.data.file_tokenizers import byte_counts

CORPUS = ['The quick brown fox jumps over the lazy dog.', 'Ça va? Très bien, merci — et toi?', '日本語のテキスト 😀 fin',
          '  two  spaces\tand a tab ', 'aaaa bbbb aaaa bbbb'] * 20


def tokenizer(**config):
  return TOKENIZERS.build(config, 'config.data.tokenizer')


@pytest.fixture(scope='module')
def sentencepiece_file(tmp_path_factory):
  import sentencepiece
  folder = tmp_path_factory.mktemp('sentencepiece')
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CORPUS), model_prefix=str(folder / 'model'), vocab_size=100, hard_vocab_limit=False,
      byte_fallback=False, minloglevel=2, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'model.model'))
  return str(folder / 'model.model'), model


@pytest.fixture(scope='module')
def json_file(tmp_path_factory):
  import tokenizers
  model = tokenizers.ByteLevelBPETokenizer()
  model.train_from_iterator(CORPUS, vocab_size=300, special_tokens=['<|end|>', '<|start|>'], show_progress=False)
  path = str(tmp_path_factory.mktemp('json') / 'tokenizer.json')
  model.save(path)
  return path, model


@given(st.text(st.characters()))
def test_bytes_are_utf8_and_come_back(text):
  built = tokenizer(name='bytes')
  ids, num_bytes = built.encode({'text': text})
  raw = text.encode('utf-8', errors='replace')
  assert bytes(ids.tolist()) == raw and num_bytes.tolist() == [1] * len(raw)
  if raw.decode() == text:
    assert built.decode(np.concatenate([[256], ids, [257]])) == text


def test_ids_pass_through_and_are_bounded():
  built = tokenizer(name='ids', num_ids=5)
  ids, num_bytes = built.encode({'tokens': np.array([4, 0, 2])})
  assert ids.tolist() == [4, 0, 2] and ids.dtype == np.int32 and num_bytes.tolist() == [1, 1, 1]
  assert (built.vocab_size, built.start, built.end) == (6, 5, None)
  with pytest.raises(DataError, match='num_ids is 5, but a document has ids from 1 to 5'):
    built.encode({'tokens': [1, 5]})


@pytest.mark.parametrize('text', CORPUS[:5] + ['', 'unseen ΩΩ letters\n'])
def test_sentencepiece_ids_are_the_librarys_and_every_byte_is_counted_once(sentencepiece_file, text):
  path, model = sentencepiece_file
  built = tokenizer(name='sentencepiece', path=path, vocab_size=model.vocab_size())
  ids, num_bytes = built.encode({'text': text})
  assert ids.tolist() == model.encode(text)
  assert len(num_bytes) == len(ids) and (num_bytes >= 0).all()
  assert num_bytes.sum() == (len(text.encode()) if len(ids) else 0)
  assert built.decode([built.start, *ids, built.end]) == model.decode(model.encode(text))


def test_sentencepiece_starts_as_t5_does(sentencepiece_file):
  path, model = sentencepiece_file
  built = tokenizer(name='sentencepiece', path=path, vocab_size=model.vocab_size())
  assert (built.start, built.end) == (0, 1)  # padding and </s>, the ids that the file was made with


@pytest.mark.parametrize('text', CORPUS[:5] + ['', 'unseen ΩΩ letters\n'])
def test_tokenizer_json_ids_are_the_librarys_and_every_byte_is_counted_once(json_file, text):
  path, model = json_file
  built = tokenizer(name='huggingface', path=path, vocab_size=model.get_vocab_size(), end_token='<|end|>')
  ids, num_bytes = built.encode({'text': text})
  assert ids.tolist() == model.encode(text).ids
  assert num_bytes.sum() == len(text.encode()) and (num_bytes >= 0).all()
  assert built.decode([*ids, built.end]) == text
  assert built.start == built.end == model.token_to_id('<|end|>')


def test_every_byte_counts_for_one_token():
  # Tokens end before bytes 1, 3, 3 and 8 of 9: the third shares the second's bytes and has none of its own, the fourth
  # takes the gap before it, and the byte after it.
  assert byte_counts(np.array([1, 3, 3, 8]), 9).tolist() == [1, 2, 0, 6]
  assert byte_counts(np.array([], int), 0).tolist() == []


def test_tokenizer_files_are_checked(tmp_path, json_file, sentencepiece_file):
  for name, extra in (('sentencepiece', {}), ('huggingface', dict(end_token='x'))):
    with pytest.raises(DataError, match=r'config.data.tokenizer.path: there is no tokenizer file /none/x'):
      tokenizer(name=name, path='/none/x', vocab_size=10, **extra).encode({'text': 'x'})
    (tmp_path / 'x').write_text('nonsense')
    with pytest.raises(DataError, match='x: not a '):
      tokenizer(name=name, path=str(tmp_path / 'x'), vocab_size=10, **extra).encode({'text': 'x'})
  for built in (tokenizer(name='huggingface', path=json_file[0], vocab_size=7, end_token='<|end|>'),
                tokenizer(name='sentencepiece', path=sentencepiece_file[0], vocab_size=7)):
    with pytest.raises(DataError, match=r'vocab_size is 7, but the largest id in .* is \d+. Set it to \d+'):
      built.encode({'text': 'x'})
  unknown = tokenizer(name='huggingface', path=json_file[0], vocab_size=json_file[1].get_vocab_size(), end_token='</s>')
  with pytest.raises(DataError, match="has no token '</s>'"):
    unknown.end  # noqa: B018


def test_tokenizers_of_text_refuse_ids_and_vice_versa():
  with pytest.raises(DataError, match="gives tokens, not text. Use the tokenizer 'ids'"):
    tokenizer(name='bytes').encode({'tokens': [1]})
  with pytest.raises(DataError, match='gives text, not tokens'):
    tokenizer(name='ids', num_ids=3).encode({'text': 'x'})
