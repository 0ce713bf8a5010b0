"""The benchmark of dispatchers: ratios and verdicts are those of times worked out by hand, and the command runs.

No time is measured here that anything depends on.
"""
import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.dispatch_benchmark import cpu, layer, peers, programs, report

SIZE = programs.Size(tokens=16, dim=4, hidden=8, experts=(2, 4), rounds=2, slow_rounds=2)


def results(seconds, case='layers', peer='moejax', **memory):
  """The results of the command if the programs took these seconds: `{Program: [seconds of each round]}`."""
  measured = {program.key: dict(seconds=times, temporary_bytes=memory.get(program.what))
              for program, times in seconds.items()}
  return dict(command='the command', size=dataclasses.asdict(SIZE), cases={case: dict(
      rounds=3, environment=dict(commit='abc', machine='a machine'), load_average=[0.1, 0.4],
      peers={peer: dict(versions=dict(jax='1'), programs=measured)})})


def test_a_ratio_is_the_median_of_the_ratios_of_rounds_not_the_ratio_of_medians():
  grouped = SIZE.program('grouped', 2)
  measured = report.Report(results({grouped: [2., 6., 40.], grouped.floor: [1., 4., 8.]}))
  # 2, 1.5 and 5 in the three rounds: median 2; half way from it to its neighbours are the quartiles. Of medians: 6 / 4.
  assert measured.ratio('layers', grouped) == (2., 1.75, 3.5)


def test_memory_is_that_of_the_layer_over_that_of_its_floor():
  grouped = SIZE.program('grouped', 2)
  measured = report.Report(results({grouped: [1.], grouped.floor: [1.]}, grouped=30, dense=40))
  assert measured.memory('layers', grouped, 'temporary_bytes') == 0.75


def test_a_missing_measurement_has_no_ratio():
  grouped = SIZE.program('grouped', 2)
  measured = report.Report(results({grouped: [2.]}))
  assert measured.ratio('layers', grouped) is None
  assert measured.ratio('swiglu', grouped) is None
  assert measured.memory('layers', grouped, 'peak_bytes') is None


def test_the_floor_has_the_tokens_choices_and_activation_of_the_layer():
  floor = SIZE.program('gather', 4, choices=3, tokens=99, activation='swiglu').floor
  assert floor == SIZE.program('dense', 1, choices=3, tokens=99, activation='swiglu')


@pytest.mark.parametrize('value, target, least, cells', [
    (1.10, 1.15, False, '1.10 | ≤ 1.15'),
    (1.15, 1.15, False, '1.15 | ≤ 1.15'),
    (1.20, 1.15, False, '**1.20, missed** | ≤ 1.15'),
    (8., 7, True, '8.00 | ≥ 7'),
    (6., 7, True, '**6.00, missed** | ≥ 7'),
    (report.Spread(1.2, 1.1, 1.3), 1.15, False, '**1.20 (1.10–1.30), missed** | ≤ 1.15'),
    (6., None, False, '6.00 | –'),
    (None, 1.15, False, '– | –'),
])
def test_a_missed_target_is_called_missed(value, target, least, cells):
  assert report.judged(value, target, least) == cells


def test_the_table_calls_one_layer_missed_and_the_other_not():
  forward, both = (SIZE.program('grouped', 2, backward) for backward in (False, True))
  floors = {program.floor: [10., 10.] for program in (forward, both)}
  text = report.table(results({forward: [11., 11.], both: [12., 12.], **floors}))
  assert '| 1.10 (1.10–1.10) | ≤ 1.15 | **1.20 (1.20–1.20), missed** | ≤ 1.1 |' in text
  assert 'the command' in text and 'commit abc, a machine, load average 0.1 to 0.4, jax 1' in text


def test_routes_have_the_load_that_they_are_named_after():
  tokens, experts, choices = 512, 8, 2
  sizes = {load: np.asarray(layer.routes(load, tokens, experts, choices).group_sizes) for load in programs.LOADS}
  assert all(size.sum() == tokens * choices for size in sizes.values())
  assert (sizes['balanced'] == 128).all()
  # Uniform: 128 each, with a standard deviation of sqrt(512 * 1/4 * 3/4) < 10.
  assert 0 < np.abs(sizes['multinomial'] - 128).max() < 50
  # An expert is drawn first with probability p, or second, after another one, with p / (1 - that one's).
  p = 1 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum()
  after = p / (1 - p)
  np.testing.assert_allclose(sizes['zipf'], 512 * p * (1 + after.sum() - after), atol=50)  # over 4 standard deviations


@pytest.mark.parametrize('load', programs.LOADS)
def test_every_token_reads_its_own_rows_which_are_those_of_different_experts(load):
  routes = layer.routes(load, 32, 4, 2)
  np.testing.assert_array_equal(routes.token[routes.position], np.arange(32)[:, None].repeat(2, 1))
  expert = np.repeat(np.arange(4), routes.group_sizes)[routes.position]
  assert (expert[:, 0] != expert[:, 1]).all()


def test_all_dispatchers_of_the_benchmark_compute_one_layer():
  # With equal parameters and room for all; a benchmark of different functions would compare nothing.
  outputs = []
  for what in ('einsum', 'gather', 'grouped', 'ragged_dot'):
    function, variables, constants = layer._function(SIZE.program(what, 2))
    outputs.append(jax.jit(function)(variables, constants))
  assert np.abs(outputs[2]).max() > 0.1
  for output in outputs[:2]:  # capacity 1.25: most tokens keep both choices
    assert np.isclose(output, outputs[2], atol=1e-5).all(-1).mean() > 0.5
  np.testing.assert_allclose(outputs[3], outputs[2], atol=1e-5)


@pytest.mark.slow
def test_the_command_times_every_program_in_processes_of_their_own_and_draws_them(tmp_path, monkeypatch, capsys):
  size = programs.QUICK
  floor, gather, routing = (size.program(what, experts)
                            for what, experts in (('dense', 1), ('gather', 4), ('routing', 4)))
  planned = {'moejax': (floor, gather), 'ragged_dot': (floor, routing), 'torch': (floor,)}
  monkeypatch.setattr(programs, 'cases', lambda _: {'layers': programs.Case(2, planned)})
  with flagsaver.flagsaver():
    flags.FLAGS(['cpu', '--quick', '--cases=layers', '--torch_python=false', f'--output={tmp_path}'])
    cpu.main([])
  case = json.loads((tmp_path / 'cpu.json').read_text())['cases']['layers']
  assert set(case['peers']) == {'moejax', 'ragged_dot'}  # torch is not to be found
  for peer, of in case['peers'].items():
    assert set(of['programs']) == {program.key for program in planned[peer]}
    assert all(len(p['seconds']) == 2 and min(p['seconds']) > 0 for p in of['programs'].values())
    assert all(p['temporary_bytes'] > 0 for p in of['programs'].values())
  assert '`gather`, capacity 1.25, over dense, E=4' in capsys.readouterr().out
  assert (tmp_path / 'figure.png').stat().st_size > 1000


def test_a_peer_that_fails_says_why():
  command = [sys.executable, '-c', 'from experiments.dispatch_benchmark import peers\n'
             'def build(program): raise ValueError("no such layer")\n'
             'peers.serve(build, {})']
  with peers.Peer(command) as peer, pytest.raises(RuntimeError, match='no such layer'):
    peer.prepare(SIZE.program('grouped', 2))


def test_a_missing_torch_is_reported_and_skipped(capsys):
  assert 'torch' not in cpu.commands('false')
  assert 'transformers is not measured' in capsys.readouterr().out
