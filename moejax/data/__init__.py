"""Data: sources of examples, and pipelines that turn them into batches.

    config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=128)
    pipeline = data.build(config.data)
    batches = pipeline.train(seed=0)       # endless; next(batches), batches.get_state(), batches.set_state(state)
    for batch in pipeline.evaluate('test'): ...

A source (`SOURCES`) gives examples by index, a tokenizer (`TOKENIZERS`) turns text into ids, and a pipeline
(`PIPELINES`) shuffles, packs and batches them. Building a pipeline opens no file; the first batch does.
"""
from collections.abc import Mapping

from moejax.data import image_text, images, language_model, span_corruption, speech  # registers pipelines
from moejax.data import (captions, cluster_patches, image_files, mixture, named_datasets, records, speech_files,
                         synthetic, synthetic_speech, text_files)  # registers sources
from moejax.data import file_tokenizers, words  # registers tokenizers
from moejax.data.pipeline import PIPELINES, Pipeline
from moejax.data.source import SOURCES, DataError, Source
from moejax.data.tokenizers import TOKENIZERS, Tokenizer

__all__ = ['PIPELINES', 'SOURCES', 'TOKENIZERS', 'DataError', 'Pipeline', 'Source', 'Tokenizer', 'build']


def build(config: Mapping, where: str = 'config.data') -> Pipeline:
  """Builds the pipeline named in `config`. Raises `ConfigError`; opens no file."""
  return PIPELINES.build(config, where)
