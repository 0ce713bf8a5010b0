"""A broken line of a file of JSON objects costs that line alone, and one message says so.

Oracle: the written rows without the broken one.
"""
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from moejax.evaluation import log
from moejax.training import metrics

ROWS = [{'step': step, 'train/loss': step / 3} for step in range(1, 6)]
LINES = [json.dumps(row).encode() for row in ROWS]


@pytest.fixture
def read(tmp_path):
  """Function (lines) -> (rows of metrics.jsonl with these lines, messages)."""
  def read(lines, end=b'\n'):
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines) + end)
    said = []
    return metrics.read(tmp_path, said.append), said
  return read


@pytest.mark.parametrize('broken', [
    LINES[2][:-9], b'\xff' + LINES[2], LINES[2].replace(b'loss', b'l\xfcss'), b'{}', b'[1, 2]', b'3', b'\0' * 20,
    b'{"step": "3"}', b'{"step": 3, "train/loss": "low"}', b'{"step": true}', b'[' * 100_000,
    LINES[2].decode().encode('utf-16'), b'{"step": 3' + b'0' * 5000 + b'}'])
def test_a_broken_line_costs_no_other(read, broken):
  rows, said = read([*LINES[:2], broken, *LINES[3:]])
  assert rows == ROWS[:2] + ROWS[3:]
  sentence, = said
  assert 'metrics.jsonl: line 3 cannot be read' in sentence


def test_many_broken_lines_are_one_sentence(read):
  rows, said = read([b'{', LINES[0], b'}', b'null', LINES[1]], end=b'')
  assert rows == ROWS[:2]
  assert len(said) == 1 and 'line 1 (and 2 more) cannot be read' in said[0]


def test_sound_and_empty_lines_need_no_sentence(read):
  assert read([*LINES, b'', b'\r']) == (ROWS, [])


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(place=st.integers(0, len(b'\n'.join(LINES)) - 1), flip=st.integers(1, 255))
def test_a_changed_byte_costs_at_most_its_own_lines(read, place, flip):
  content = bytearray(b'\n'.join(LINES))
  content[place] ^= flip
  number = b'\n'.join(LINES)[:place].count(b'\n')
  touched = {number, number + 1}  # where it was the newline, two lines have become one
  rows, _ = read([bytes(content)])
  assert all(row in rows for index, row in enumerate(ROWS) if index not in touched)


def test_a_run_resumes_with_all_rows_but_the_broken_one_and_reports_it_once(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join([LINES[0], b'{"step": 2, \xff', *LINES[2:]]) + b'\n')
  for sentences in (1, 0):
    said = []
    with metrics.MetricsWriter(tmp_path, 4, said.append) as writer:
      assert writer.kept == [ROWS[0], *ROWS[2:4]]
    assert len(said) == sentences


def test_a_measurement_after_a_truncated_one_has_a_line_of_its_own(tmp_path):
  log.append(tmp_path, 10, {}, {'test/accuracy': 0.5})
  with open(tmp_path / log.FILE, 'a') as file:
    file.write('{"step": 20, "overr')
  log.append(tmp_path, 30, {'model.x': float('inf')}, {'test/accuracy': float('nan')})
  said = []
  assert log.read(tmp_path, said.append) == [
      {'step': 10, 'overrides': {}, 'metrics': {'test/accuracy': 0.5}},
      {'step': 30, 'overrides': {'model.x': None}, 'metrics': {'test/accuracy': None}}]
  assert len(said) == 1 and 'line 2 cannot be read' in said[0]


@pytest.mark.parametrize('broken', ['{}', '{"step": 5, "overrides": {}, "metrics": {"a": "b"}}',
                                    '{"step": 5, "overrides": [], "metrics": {}}'])
def test_a_measurement_without_the_values_of_the_report_is_skipped(tmp_path, broken):
  (tmp_path / log.FILE).write_text(broken + '\n')
  assert log.read(tmp_path, lambda sentence: None) == []
