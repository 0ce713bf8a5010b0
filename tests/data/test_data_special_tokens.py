"""Text of data never becomes a special token, whatever it spells, and a vocabulary ends at its largest id."""
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moejax.data import TOKENIZERS, DataError

SENTENCE = 'They write <|endoftext|> between documents.'


def build(name, **config):
  return TOKENIZERS.build(dict(name=name, **config), 'config.data.tokenizer')


def saved(model, folder, **changes):
  path = str(folder / 'tokenizer.json')
  content = {**json.loads(model.to_str()), **changes}
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(content, file)
  return path


def byte_level():
  """Every byte is a token, plus one that ends documents."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  model = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
  model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  return model


def added(token, special, id=256):
  return dict(id=id, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)


@pytest.mark.parametrize('special', [True, False], ids=['called special', 'an added token like others'])
@pytest.mark.parametrize('text', [SENTENCE, '<|endoftext|>', 'a<|endoftext|><|endoftext|>b <|endoftext|>',
                                  '<|start|>é'])
def test_text_that_spells_a_special_token_stays_text_and_comes_back(tmp_path, special, text):
  tokens = [added('<|endoftext|>', special), added('<|start|>', special, 257)]
  path = saved(byte_level(), tmp_path, added_tokens=tokens)
  built = build('huggingface', path=path, vocab_size=258, end_token='<|endoftext|>', start_token='<|start|>')
  ids, num_bytes = built.encode({'text': text})
  assert not set(ids.tolist()) & {256, 257}
  assert len(ids) == num_bytes.sum() == len(text.encode())  # this vocabulary has no tokens of several bytes
  assert built.decode(np.array([257, *ids, 256])) == text


def unigram(folder):
  """Like T5's: the vocabulary itself contains `</s>`, and would choose it."""
  letters = 'abcdefghijklmnopqrstuvwxyzT</>▁.'
  model = tokenizers.Tokenizer(models.Unigram([('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.),
                                               *((letter, -5.) for letter in letters)], unk_id=2))
  model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  model.add_special_tokens(['<pad>', '</s>', '<unk>'])
  return build('huggingface', path=saved(model, folder), vocab_size=3 + len(letters), end_token='</s>',
               start_token='<pad>')


@pytest.mark.parametrize('text', ['a </s> b', '</s>', 'x<pad></s></s>'])
def test_a_vocabulary_that_spells_its_special_tokens_gets_them_in_parts(tmp_path, text):
  built = unigram(tmp_path)
  ids, num_bytes = built.encode({'text': text})
  assert ids.min() > 2 and num_bytes.sum() == len(text)
  assert built.decode(ids).replace(' ', '') == text.replace(' ', '')


def test_text_outside_the_vocabulary_is_unknown_and_not_cut(tmp_path):
  built = unigram(tmp_path)
  ids, num_bytes = built.encode({'text': 'a 日本'})
  assert ids.tolist().count(2) == 1 and num_bytes.tolist()[-1] == 6


def test_a_special_token_of_one_character_cannot_be_text(tmp_path):
  path = saved(byte_level(), tmp_path, added_tokens=[added('\u2402', False)])
  built = build('huggingface', path=path, vocab_size=257, end_token='\u2402')
  with pytest.raises(ValueError, match='the special token 256, and it cannot be split'):
    built.encode({'text': 'a\u2402b'})


def test_unknown_words_that_would_end_a_document_are_refused(tmp_path):
  model = tokenizers.Tokenizer(models.WordLevel({'</s>': 0, 'a': 1}, unk_token='</s>'))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  built = build('huggingface', path=saved(model, tmp_path), vocab_size=2, end_token='</s>')
  assert built.encode({'text': 'a a'})[0].tolist() == [1, 1]
  with pytest.raises(ValueError, match='the special token 0, and it cannot be split'):
    built.encode({'text': 'a zebra'})


def test_sentencepiece_reads_its_own_special_tokens_as_text(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['They write </s> < / s > between']), model_writer=model, vocab_size=40,
      hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  (tmp_path / 'model').write_bytes(model.getvalue())
  size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
  built = build('sentencepiece', path=str(tmp_path / 'model'), vocab_size=size)
  ids, _ = built.encode({'text': 'They </s> write'})
  assert ids.min() > 1 and built.decode(ids) == 'They </s> write'


@pytest.mark.parametrize('name, config', [('bytes', {}), ('hashed_words', dict(vocab_size=9))])
def test_tokenizers_without_a_file_have_no_special_tokens_in_text(name, config):
  built = build(name, **config)
  ids, _ = built.encode({'text': SENTENCE + ' <s> </s> \x00'})
  assert not {built.start, built.end} & set(ids.tolist())


# the bound of a vocabulary

@pytest.mark.parametrize('vocab, extra, largest', [
    ({'a': 0, 'b': 99, '</s>': 2}, [], 99), ({'a': 0, 'b': 1, '</s>': 2}, [], 2), ({'</s>': 7}, [], 7)])
def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_id(tmp_path, vocab, extra, largest):
  model = tokenizers.Tokenizer(models.WordLevel(vocab))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  config = dict(path=saved(model, tmp_path), end_token='</s>')
  entries = len(vocab)
  if entries != largest + 1:
    with pytest.raises(DataError, match=f'vocab_size is {entries}, but the largest id in .* is {largest}. '
                                        f'Set it to {largest + 1}'):
      build('huggingface', vocab_size=entries, **config).encode({'text': 'a b'})
  ids, _ = build('huggingface', vocab_size=largest + 1, **config).encode({'text': ' '.join(set(vocab) - {'</s>'})})
  assert all(0 <= id <= largest for id in ids)


@pytest.mark.parametrize('tokens', [np.array([2**32 + 1]), [5], [-1]])
def test_ids_out_of_bounds_are_refused_and_do_not_wrap(tokens):
  with pytest.raises(DataError, match='num_ids is 5, but a document has ids from'):
    build('ids', num_ids=5).encode({'tokens': tokens})


@pytest.mark.parametrize('tokens', [[1.5], ['a'], [None], [[1, 2]], 3])
def test_documents_that_are_not_ids_are_refused(tokens):
  with pytest.raises((TypeError, ValueError), match='its tokens have the shape|not made of ints'):
    build('ids', num_ids=5).encode({'tokens': tokens})
