"""The pipeline 'span_corruption': T5's denoising (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4)."""
import numpy as np

from moejax.config import ConfigError
from moejax.data.packing import FirstFitWindow
from moejax.data.pipeline import PIPELINES
from moejax.data.text_pipeline import Balance, TextPipeline


@PIPELINES('span_corruption')
class SpanCorruption(TextPipeline):
  """Spans of the encoder's text are replaced by sentinels; the decoder writes each sentinel and what it stands for.

  Batches of encoder_tokens, encoder_segments, encoder_positions <int32>[B,length]; decoder_tokens, decoder_targets,
  decoder_segments, decoder_positions, target_bytes <int32>[B,target_length]; loss_mask <float32>[B,target_length]; and,
  where the source has tasks, encoder_tasks and decoder_tasks.

  Documents are cut into chunks of `chunk_length` tokens, the most whose corrupted form fits `length`; each is corrupted
  anew every epoch, and whole chunks are packed. A last chunk of one token, in which nothing could be left, is dropped.
  As in T5, sentinels are the highest ids, in descending order: the first is `vocab_size - 1`, and
  `vocab_size = tokenizer.vocab_size + sentinels`. `target_bytes` is 0 for sentinels and the end.

  Config:
    length: tokens of the encoder; `target_length`, those of the decoder, follows from it.
    noise_density: share of tokens that the decoder writes.
    mean_span: mean length of a span.
    sentinels: how many there are.
    balance: of what training batches are made in equal parts; see `TextPipeline`.
  """

  def __init__(self, where, source: dict, tokenizer: dict, length: int, batch_size: int, noise_density: float = 0.15,
               mean_span: float = 3.0, sentinels: int = 100, shuffle_batches: int = 16, threads: int = 0,
               readers: int = 1, balance: Balance = 'examples'):
    super().__init__(where, source, tokenizer, batch_size, shuffle_batches, threads, readers, balance)
    if not 0 < noise_density < 1:
      raise ConfigError(f'{where}.noise_density must be between 0 and 1, not {noise_density}.')
    if mean_span < 1:
      raise ConfigError(f'{where}.mean_span must be 1 or more, not {mean_span}.')
    self.noise_density, self.mean_span, self.length = noise_density, mean_span, length
    self.chunk_length, self.target_length = corrupted_lengths(length, noise_density, mean_span, where)
    spans = noise_counts(self.chunk_length, noise_density, mean_span)[1]
    if spans > sentinels:
      raise ConfigError(f'{where}.sentinels: a chunk of {self.chunk_length} tokens has {spans} spans, but there are '
                        f'{sentinels} sentinels. Set it to {spans} or more.')
    self.vocab_size = self.tokenizer.vocab_size + sentinels

  target_segments = 'decoder_segments'

  @property
  def lengths(self):
    tasks = ('tasks',) if self.source.tasks else ()
    encoder = {f'encoder_{name}': self.length for name in ('tokens', 'segments', 'positions', *tasks)}
    decoder = {f'decoder_{name}': self.target_length for name in ('tokens', 'targets', 'segments', 'positions', *tasks)}
    return {**encoder, **decoder, 'target_bytes': self.target_length}

  def prepare(self, ids, num_bytes, seed, task=None):
    if self.tokenizer.end is None:
      raise ConfigError(f'{self.where}.tokenizer: span corruption ends its texts with an end token, and this tokenizer '
                        'has none. Use another.')
    rng = np.random.default_rng(seed)
    starts = range(0, len(ids) - 1, self.chunk_length)
    chunks = [slice(start, start + self.chunk_length) for start in starts]
    pieces = [self._corrupt(ids[chunk], num_bytes[chunk], rng) for chunk in chunks]
    if self.source.tasks:
      for piece in pieces:
        for side, arrays in piece.items():
          arrays[f'{side}_tasks'] = np.full(len(arrays[f'{side}_tokens']), task, np.int32)
    return pieces

  def window(self, num_rows):
    return FirstFitWindow(num_rows, {'encoder': self.length, 'decoder': self.target_length})

  def _corrupt(self, ids, num_bytes, rng):
    noise = noise_mask(len(ids), self.noise_density, self.mean_span, rng)
    end, first = self.tokenizer.end, self.vocab_size - 1
    targets = np.append(replace_spans(ids, ~noise, first), end).astype(np.int32)
    return {
        'encoder': {'encoder_tokens': np.append(replace_spans(ids, noise, first), end).astype(np.int32)},
        'decoder': {
            'decoder_tokens': np.append([self.tokenizer.start], targets[:-1]).astype(np.int32),
            'decoder_targets': targets,
            'target_bytes': np.append(replace_spans(num_bytes, ~noise, None), 0).astype(np.int32)}}


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """Tokens that become noise, and the spans they are in, of a text of `length` tokens (2 or more).

  T5: both are rounded; at least one token is noise and at least one is not; spans touch neither one another nor the
  beginning, so that there are no more of them than of either kind of token.
  """
  noise = min(max(round(length * density), 1), length - 1)
  return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def corrupted_lengths(length: int, density: float, mean_span: float, where: str) -> tuple[int, int]:
  """The most tokens whose corrupted form fits an encoder of `length`, and the length of the decoder then.

  The encoder reads the other tokens, a sentinel a span, and the end; the decoder writes the noise, a sentinel a span,
  and the end. T5's 512 gives 568 and 114.
  """
  def encoder(tokens):
    noise, spans = noise_counts(tokens, density, mean_span)
    return tokens - noise + spans + 1

  if length < encoder(2):
    raise ConfigError(f'{where}.length must be {encoder(2)} or more, not {length}.')
  tokens = 2
  while encoder(tokens + 1) <= length:
    tokens += 1
  noise, spans = noise_counts(tokens, density, mean_span)
  return tokens, noise + spans + 1


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
  """<bool>[length], True in the spans to be replaced: the first token is not noise, the last is.

  Lengths of spans, and of what is between them, are drawn uniformly among those with the counts of `noise_counts`.
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
  """`parts` positive numbers with the sum `total`, uniformly among all such."""
  cuts = rng.choice(total - 1, parts - 1, replace=False)
  cuts.sort()
  return np.diff(cuts + 1, prepend=0, append=total)
