"""Means, differences and their intervals: by tables of Student's t, and where Welch's test rejects."""
import math

import pytest
from scipy import stats

from experiments import compare, runner
from experiments.compare import Interval
from moejax.config import ConfigError


def rows(**values):
  return [dict(key=f'{name}-{seed}', name=name, seed=seed, command='c', commit='c0ffee', machine='m', python='3',
               jax='1', metrics=dict(x=value, accuracy=value / 10))
          for name, numbers in values.items() for seed, value in enumerate(numbers)]


def test_the_interval_of_a_mean_is_student_s():
  # Mean 3; squared distances 4 + 1 + 9 over 2 degrees of freedom; 4.303 in the tables for 95% and two degrees.
  half = 4.303 * math.sqrt(7 / 3)
  found = compare.mean([1., 2., 6.])
  assert (found.center, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-3)


def test_the_interval_of_a_difference_ends_where_welch_s_test_rejects():
  values, others = [1., 2., 3., 5.], [2., 4., 9.]
  found = compare.difference(values, others)
  assert found.center == pytest.approx(2.75 - 5)
  for end in (found.low, found.high):
    assert stats.ttest_ind([value - end for value in values], others, equal_var=False).pvalue == pytest.approx(0.05)


def test_one_seed_has_no_interval_and_equal_seeds_have_none_to_speak_of():
  assert compare.mean([2.]) == Interval(2.)
  assert compare.difference([2.], [1., 1.]) == Interval(1.)
  assert compare.mean([2., 2.]) == Interval(2., 2., 2.)
  assert compare.difference([2., 2.], [1., 1.]) == Interval(1., 1., 1.)


def test_a_table_has_means_and_differences_from_the_first_variant():
  lines = compare.table(rows(dense=[5., 5.], sparse=[6.], other=[4., 4.]), dict(x='score', accuracy='test accuracy'),
                        dict(x=('trigram', 3.))).splitlines()
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
  assert cells == [
      ['model', 'score', 'minus dense', 'test accuracy', 'minus dense (points)', 'seeds'],
      ['---'] * 6,
      ['dense', '5.000 (5.000 to 5.000)', '', '50.0% (50.0% to 50.0%)', '', '2'],
      ['sparse', '6.000', '+1.000', '60.0%', '+10.0', '1'],
      ['other', '4.000 (4.000 to 4.000)', '-1.000 (-1.000 to -1.000)', '40.0% (40.0% to 40.0%)',
       '-10.0 (-10.0 to -10.0)', '2'],
      ['trigram', '3.000', '', '', '', '']]


def test_a_run_without_the_metric_is_named():
  with pytest.raises(ConfigError, match='a-0 has no y. It has x, accuracy.'):
    compare.by_variant(rows(a=[1.]), 'y')


def test_the_source_names_every_commit():
  results = dict(command='python -m x', runs=rows(a=[1., 2.]))
  results['runs'][1]['commit'] = 'decade'
  assert compare.source(results).startswith('`python -m x`, commit c0ffee and decade, m, Python 3, jax 1; mean')


def test_a_figure_has_a_panel_a_metric_with_a_dot_a_seed_and_a_bar_over_the_interval():
  figure = compare.draw(rows(a=[1., 2., 6.], b=[5.]), dict(x='score', accuracy='accuracy'), dict(x=('bar', 3.)))
  score, accuracy = figure.axes
  drawn = [list(line.get_xdata()) for line in score.lines]
  found = compare.mean([1., 2., 6.])
  assert drawn == [[1., 2., 6.], [found.low, found.high], [3.], [5.], [5.], [3., 3.]]
  assert [label.get_text() for label in score.get_yticklabels()] == ['a', 'b'] and len(accuracy.lines) == 5


def test_a_study_without_metrics_or_results_has_nothing_to_compare(tmp_path):
  (tmp_path / 'sweep.py').write_text('METRICS = dict(x="x")\ndef sweep():\n  return []\n')
  with pytest.raises(ConfigError, match='no results yet'):
    compare.show(runner.find(str(tmp_path)))
  (tmp_path / 'sweep.py').write_text('def sweep():\n  return []\n')
  with pytest.raises(ConfigError, match='names no METRICS'):
    compare.show(runner.find(str(tmp_path)))
