"""Which processes connect, and which rows of a batch a process loads. Runs of several are in test_process_agreement.

Oracle of the environments: the variables that each cluster sets, as its documentation has them.
"""
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import process_launcher
import pytest

from moejax.config import ConfigError
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import processes, rules

SLURM = dict(SLURM_JOB_ID='7', SLURM_STEP_NODELIST='node[1-2]', SLURM_PROCID='0', SLURM_LOCALID='0')
TPU = dict(TPU_ML_PLATFORM='JAX')
POD = dict(KUBERNETES_SERVICE_HOST='10.0.0.1')


@pytest.mark.parametrize('environment, name', [
    ({}, None),
    (SLURM | dict(SLURM_NTASKS='2'), 'SLURM'),
    (SLURM | dict(SLURM_NTASKS='1'), None),  # a shell in an interactive job
    (dict(SLURM_JOB_ID='7', SLURM_NTASKS='2', SLURM_PROCID='0'), None),  # the script of a batch job, outside srun
    (dict(OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_RANK='0'), 'Open MPI'),
    (dict(OMPI_COMM_WORLD_SIZE='1'), None),
    (TPU, 'Cloud TPU'),
    (TPU | dict(TPU_SKIP_MDS_QUERY='1'), None),  # no metadata, so nobody says that there are others
    (TPU | dict(TPU_WORKER_HOSTNAMES='localhost'), None),
    (TPU | dict(TPU_WORKER_HOSTNAMES='host-0,host-1', TPU_WORKER_ID='1'), 'GKE'),
    (TPU | dict(TPU_WORKER_HOSTNAMES='host-0', MEGASCALE_NUM_SLICES='2'), 'GKE'),
    (POD | dict(JOB_COMPLETION_INDEX='0'), 'Kubernetes'),
    (POD, None),  # a notebook in a cluster
])
def test_a_process_joins_others_where_its_environment_says_that_there_are_some(environment, name):
  assert processes.cluster(environment) == name


@pytest.mark.parametrize('arguments, sentence', [
    (dict(coordinator='localhost:1'), '--coordinator without --num_processes and --process_id'),
    (dict(coordinator='localhost:1', num_processes=2), '--coordinator and --num_processes without --process_id'),
    (dict(coordinator='localhost', num_processes=2, process_id=0), "host:port, e.g. localhost:1234, not 'localhost'"),
    (dict(coordinator='localhost:1', num_processes=2, process_id=2), '--process_id must be between 0 and .* 1, not 2'),
    (dict(coordinator='localhost:1', num_processes=0, process_id=0), '--process_id must be between'),
])
def test_processes_that_cannot_connect_are_refused_in_a_sentence(arguments, sentence):
  with pytest.raises(ConfigError, match=sentence):
    processes.start(**arguments)


def test_a_process_alone_starts_nothing(monkeypatch):
  monkeypatch.setattr(jax.distributed, 'initialize', None)
  for name in SLURM:
    monkeypatch.delenv(name, raising=False)
  processes.start()
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '4')
  processes.start(num_processes=1)


def test_others_that_cannot_be_reached_are_named(monkeypatch):
  def timeout(*arguments, **options):
    raise RuntimeError('DEADLINE_EXCEEDED.')
  monkeypatch.setattr(jax.distributed, 'initialize', timeout)
  monkeypatch.setattr(jax.config, 'update', lambda *option: None)  # those of this process stay as they are
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '4')
  with pytest.raises(ConfigError, match='given by Open MPI, were not found: DEADLINE_EXCEEDED. For a single process'):
    processes.start()


@pytest.mark.parametrize('environment, arguments, bound', [
    ({}, ('host-1:1234', 2, 0), 'host-1:1234'),
    ({}, ('[::1]:1234', 2, 1), '[::1]:1234'),
    (dict(JAX_COORDINATOR_BIND_ADDRESS='10.0.0.7:1234'), ('service:1234', 2, 0), '10.0.0.7:1234'),
    (dict(OMPI_COMM_WORLD_SIZE='4'), (), None),  # the address is the cluster's to know
])
def test_the_coordinator_listens_where_it_is_named(environment, arguments, bound, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *named, **options: calls.append(options))
  monkeypatch.setattr(jax.config, 'update', lambda *option: None)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.start(*arguments)
  assert calls[0]['coordinator_bind_address'] == bound
  assert calls[0]['heartbeat_timeout_seconds'] <= 30  # by then a dead process has been noticed


@pytest.mark.skipif(not Path('/proc/net/tcp').exists(), reason='Linux lists the sockets that listen')
def test_a_coordinator_on_localhost_is_not_reachable_from_other_machines():
  port = process_launcher.free_port()
  waits = subprocess.Popen(
      [sys.executable, '-c', f"from moejax.parallel import processes; processes.start('localhost:{port}', 2, 0)"],
      env=process_launcher.environment(1), stderr=subprocess.DEVNULL, cwd=process_launcher.ROOT)
  try:
    while not (found := listening(port)) and waits.poll() is None:
      time.sleep(0.05)
    # 127.0.0.1, the same in IPv6, and ::1, each word in the order of the machine.
    assert found and found <= {'0100007F', '0000000000000000FFFF00000100007F', '00000000000000000000000001000000'}
  finally:
    waits.kill()


def listening(port):
  """The addresses, in hexadecimal, at which some process listens on `port`."""
  lines = [line.split() for name in ('tcp', 'tcp6') if Path(f'/proc/net/{name}').exists()
           for line in Path(f'/proc/net/{name}').read_text().splitlines()[1:]]
  return {line[1].split(':')[0] for line in lines if line[3] == '0A' and int(line[1].split(':')[1], 16) == port}


@pytest.mark.parametrize('config', [dict(data=8), dict(data=2, expert=2, model=2), dict(fsdp=1, model=8), dict(fsdp=8)])
def test_one_process_feeds_all_rows_and_places_them_as_the_batch_is_sharded(config):
  mesh = mesh_lib.build({'data': 1, **config})
  batch = dict(tokens=np.arange(48).reshape(16, 3), valid=np.arange(16) % 2 == 0)
  np.testing.assert_array_equal(processes.local_rows(mesh, 16), np.arange(16))
  for name, placed in processes.place(mesh, batch).items():
    expected = jax.device_put(batch[name], rules.batch_sharding(mesh))
    assert placed.sharding == expected.sharding
    for found, wanted in zip(placed.addressable_shards, expected.addressable_shards, strict=True):
      np.testing.assert_array_equal(found.data, wanted.data)
