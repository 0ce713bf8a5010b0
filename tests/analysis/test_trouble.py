"""Trouble is in the report with its layer, steps and counts. Oracle: hand-written rows."""
from moejax.analysis import history, trouble


def series(alarms, skipped=None):
  rows = []
  for i, alarm in enumerate(alarms):
    share = 0.97 if alarm else 0.3
    rows.append({'step': 10 * (i + 1), 'alarm/collapse/block_01': float(alarm),
                 'router/block_01/load': [(1 - share) / 3, share, (1 - share) / 3, (1 - share) / 3],
                 'recovery/skipped': skipped[i] if skipped else 0, 'recovery/rollbacks': 0, 'recovery/lost': 0})
  return history.series(rows)


def test_a_collapse_is_named_with_its_layer_expert_and_steps():
  found = series([0, 1, 1, 0, 1])
  assert trouble.collapses(found) == [('block_01', 20, 40, 1, 0.97), ('block_01', 50, None, 1, 0.97)]
  assert trouble.remarks(found) == [
      'block_01: the router collapsed at step 20: 97% of the choices selected expert 1. It had recovered by step 40.',
      'block_01: the router collapsed at step 50: 97% of the choices selected expert 1. It has not recovered.']
  html = trouble.section(found)
  assert '<td>block_01</td><td class=number>20</td><td>40</td>' in html and '<td>the end</td>' in html


def test_skipped_batches_are_shown_where_their_number_changes():
  html = trouble.section(series([0] * 4, skipped=[0, 2, 2, 3]))
  assert '<td class=number>20</td><td class=number>2</td>' in html
  assert '<td class=number>40</td><td class=number>3</td>' in html and '<td class=number>30</td>' not in html
  assert 'or spiked: 3. Rollbacks: 0.' in trouble.remarks(series([0] * 4, skipped=[0, 2, 2, 3]))[0]


def test_a_healthy_run_says_so():
  assert trouble.remarks(series([0, 0])) == [] and 'None: no router' in trouble.section(series([0, 0]))
  assert trouble.remarks({}) == [] and 'None: no router' in trouble.section({})
