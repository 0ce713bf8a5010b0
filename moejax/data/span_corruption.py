"""The pipeline 'span_corruption': T5's denoising (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4)."""
import bisect
from typing import Annotated

import numpy as np

from moejax.config import ConfigError
from moejax.data.packing import FirstFitWindow
from moejax.data.pipeline import PIPELINES, PartOfBatch
from moejax.data.source import Share
from moejax.data.text_pipeline import Balance, TextPipeline, joined, with_last
from moejax.ranges import AtLeast, Count, Natural


@PIPELINES('span_corruption')
class SpanCorruption(TextPipeline):
  """The encoder reads text with spans replaced by sentinels; the decoder writes each sentinel and its span.

  Batches of encoder_tokens, encoder_segments, encoder_positions <int32>[B,length]; decoder_tokens, decoder_targets,
  decoder_segments, decoder_positions, target_bytes <int32>[B,target_length]; loss_mask <float32>[B,target_length]; and,
  where the source has tasks, encoder_tasks and decoder_tasks.

  Documents are cut into chunks of `chunk_length` tokens, the most whose corrupted form fits `length`; each is corrupted
  anew every epoch, and whole chunks are packed. A last chunk of one token, too short to corrupt, is dropped.
  As in T5, sentinels are the highest ids, in descending order: the first is `vocab_size - 1`, and
  `vocab_size = tokenizer.vocab_size + sentinels`. `target_bytes` is 0 for sentinels and the end.

  Config keys:
    length: tokens of the encoder; `target_length`, the tokens of the decoder, follows from it.
    noise_density: share of tokens that the decoder writes.
    mean_span: mean length of a span.
    sentinels: number of sentinels.
  """

  def __init__(self, source: dict, tokenizer: dict, length: Count, batch_size: Count,
               noise_density: Share = 0.15, mean_span: Annotated[float, AtLeast(1)] = 3.0, sentinels: Count = 100,
               shuffle_batches: Count = 16, threads: Natural = 0, readers: PartOfBatch = 1,
               balance: Balance = 'examples'):
    super().__init__(source, tokenizer, batch_size, shuffle_batches, threads, readers, balance)
    self.noise_density, self.mean_span, self.length = noise_density, mean_span, length
    self.chunk_length, self.target_length = corrupted_lengths(length, noise_density, mean_span)
    spans = noise_counts(self.chunk_length, noise_density, mean_span)[1]
    if spans > sentinels:
      raise ConfigError(f'.sentinels: a chunk of {self.chunk_length} tokens has {spans} spans, but there are '
                        f'{sentinels} sentinels. Set it to at least {spans}.')
    self.vocab_size = self.tokenizer.vocab_size + sentinels

  @property
  def target_segments(self):
    return 'decoder_segments'

  @property
  def lengths(self):
    tasks = ('tasks',) if self.source.tasks else ()
    encoder = {f'encoder_{name}': self.length for name in ('tokens', 'segments', 'positions', *tasks)}
    decoder = {f'decoder_{name}': self.target_length for name in ('tokens', 'targets', 'segments', 'positions', *tasks)}
    return {**encoder, **decoder, 'target_bytes': self.target_length}

  def prepare(self, pieces, seed, task=None):
    if self.tokenizer.end is None:
      raise ConfigError(f'{self.where}.tokenizer: span corruption requires an end token, which this tokenizer '
                        'does not have. Use another.')
    rng = np.random.default_rng(seed)
    ids, num_bytes = np.zeros((2, 0), np.int32)
    for piece, last in with_last(pieces):
      ids, num_bytes = joined(ids, piece[0]), joined(num_bytes, piece[1])
      # The rest of an unfilled chunk waits for the next piece; a last chunk of one token is dropped.
      stop = len(ids) - 1 if last else len(ids) // self.chunk_length * self.chunk_length
      chunks = [slice(start, start + self.chunk_length) for start in range(0, stop, self.chunk_length)]
      yield len(chunks), [self._corrupt(ids[chunk], num_bytes[chunk], rng, task) for chunk in chunks]
      ids, num_bytes = ids[stop:], num_bytes[stop:]

  def window(self, num_rows):
    return FirstFitWindow(num_rows, {'encoder': self.length, 'decoder': self.target_length})

  def _corrupt(self, ids, num_bytes, rng, task):
    noise = noise_mask(len(ids), self.noise_density, self.mean_span, rng)
    end, first = [self.tokenizer.end], self.vocab_size - 1
    targets = joined(replace_spans(ids, ~noise, first), end)
    piece = {
        'encoder': {'encoder_tokens': joined(replace_spans(ids, noise, first), end)},
        'decoder': {
            'decoder_tokens': joined([self.tokenizer.start], targets[:-1]),
            'decoder_targets': targets,
            'target_bytes': joined(replace_spans(num_bytes, ~noise, None), [0])}}
    if self.source.tasks:
      for side, arrays in piece.items():
        arrays[f'{side}_tasks'] = np.full(len(arrays[f'{side}_tokens']), task, np.int32)
    return piece


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """Numbers of noise tokens and of their spans in a text of `length` tokens (2 or more).

  As in T5, both are rounded; at least one token is noise and at least one is not; spans touch neither each other nor
  the beginning, so there are at most as many spans as tokens of either kind.
  """
  noise = min(max(round(length * density), 1), length - 1)
  return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def corrupted_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """The most tokens whose corrupted form fits an encoder of `length`, and the resulting length of the decoder.

  The encoder reads the other tokens, a sentinel per span, and the end; the decoder writes the noise, a sentinel per
  span, and the end. T5's 512 gives 568 and 114.
  """
  def encoder(tokens):
    noise, spans = noise_counts(tokens, density, mean_span)
    return tokens - noise + spans + 1

  if length < encoder(2):
    raise ConfigError(f'.length must be at least {encoder(2)}, not {length}.')
  high = 4
  while encoder(high) <= length:
    high *= 2
  tokens = bisect.bisect_right(range(high), length, lo=2, key=encoder) - 1
  noise, spans = noise_counts(tokens, density, mean_span)
  return tokens, noise + spans + 1


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
  """<bool>[length], True in the spans to be replaced: the first token is not noise, the last is.

  Lengths of the spans and of the gaps between them are drawn uniformly, given the counts of `noise_counts`.
  """
  noise, spans = noise_counts(length, density, mean_span)
  lengths = np.stack([_composition(length - noise, spans, rng), _composition(noise, spans, rng)], -1).ravel()
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def replace_spans(values: np.ndarray, replaced: np.ndarray, first: int | None) -> np.ndarray:
  """Each run of `replaced` becomes one value: `first`, `first - 1`, ...; 0 where `first` is None."""
  begins = replaced & ~np.append(False, replaced[:-1])
  markers = 0 if first is None else first - (np.cumsum(begins) - 1)
  return np.where(begins, markers, values)[~replaced | begins]


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """`parts` positive ints with the sum `total`, drawn uniformly."""
  cuts = rng.choice(total - 1, parts - 1, replace=False)
  cuts.sort()
  return np.diff(cuts + 1, prepend=0, append=total)
