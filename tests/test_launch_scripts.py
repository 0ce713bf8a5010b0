"""The launch scripts, with commands in the places of Python, SLURM and XPK that end as they are told, or write down how
they were called."""
import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'experiments/launch'
SCRIPT = LAUNCH / 'host_port.sh'

# Acts for the process of its --process_id: `act_0`, `act_1`, ... of the environment.
PYTHON = '''#!/usr/bin/env bash
for argument; do [[ $argument == --process_id=* ]] && id=${argument#*=}; done
act=act_$id
eval "${!act}"
'''


def run(folder, *acts):
  (folder / 'python').write_text(PYTHON)
  (folder / 'python').chmod(0o755)
  environment = dict(os.environ, PATH=f'{folder}:{os.environ["PATH"]}', PORT='1234',
                     **{f'act_{number}': act for number, act in enumerate(acts)})
  return subprocess.run(['bash', SCRIPT, str(len(acts)), '--config=x'], env=environment, capture_output=True, text=True,
                        timeout=30)


@pytest.mark.parametrize('acts', [
    ('exit 0',), ('exit 0', 'exit 0'), ('sleep 0.5', 'exit 0', 'sleep 0.3'), ('sleep 0.1',) * 4])
def test_a_good_run_ends_without_a_word_of_the_shell(tmp_path, acts):
  ended = run(tmp_path, *acts)
  assert (ended.returncode, ended.stderr) == (0, '')


@pytest.mark.parametrize('acts, code', [
    (('exit 2', 'exec sleep 20'), 2), (('exec sleep 20', 'sleep 0.3; exit 3', 'exec sleep 20'), 3),
    (('kill -9 $$', 'exec sleep 20'), 137)])
def test_the_first_that_fails_gives_its_code_and_ends_the_others(tmp_path, acts, code):
  ended = run(tmp_path, *acts)
  assert ended.returncode == code and 'no such job' not in ended.stderr


# ---- SLURM ----------------------------------------------------------------------------------------------------------

# Like srun: the command's exit code, and its signals. Python is ready for a signal when its arguments are in `called`, one
# a line.
SRUN = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"'
PYTHON_OF_TASK = '''
[[ -z ${on_term:-} ]] || trap "$on_term" TERM
printf "%s\\n" "$@" > arguments && mv arguments called
eval "${act:-exit 0}"
'''
SCONTROL = 'echo "$@" > queued_again'


def fake(folder, **commands):
  for name, lines in commands.items():
    (folder / name).write_text(f'#!/usr/bin/env bash\n{lines}\n')
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
  """A folder that jobs are submitted from, and `submit(script, *arguments, **variables)`, which starts one."""
  (tmp_path / 'experiments').mkdir()
  (tmp_path / 'experiments/launch').symlink_to(LAUNCH)
  fake(tmp_path, srun=SRUN, python=PYTHON_OF_TASK, scontrol=SCONTROL)

  def submit(script, *arguments, **variables):
    copy = tmp_path / 'slurm_script'  # SLURM runs a copy, which lies elsewhere
    copy.write_text((LAUNCH / script).read_text())
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7', **variables}
    return subprocess.Popen(['bash', copy, *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
  return tmp_path, submit


def called(folder):
  return (folder / 'called').read_text().splitlines()


def signalled(folder, job, number):
  """The exit code of `job`, which gets the signal once its Python has started."""
  while not (folder / 'called').exists():
    assert job.poll() is None
  job.send_signal(number)
  job.communicate(timeout=30)
  return job.returncode


SAVES = dict(on_term='exit 143', act='while :; do sleep 0.05; done')


@pytest.mark.parametrize('script', ['slurm.sbatch', 'slurm_follow.sbatch'])
def test_a_job_that_the_time_limit_stops_saves_and_is_queued_again(cluster, script):
  folder, submit = cluster
  job = submit(script, '--workdir=runs/a b', **SAVES)
  assert signalled(folder, job, signal.SIGUSR1) == 143
  assert (folder / 'queued_again').read_text() == 'requeue 7\n'
  assert called(folder)[-1] == '--workdir=runs/a b'


def test_of_an_array_only_the_task_is_queued_again(cluster):
  folder, submit = cluster
  (folder / 'study.txt').write_text('a\nb\n')
  job = submit('slurm_array.sbatch', 'study.txt', 'runs', **SAVES, SLURM_ARRAY_JOB_ID='7', SLURM_ARRAY_TASK_ID='2')
  assert signalled(folder, job, signal.SIGUSR1) == 143
  assert (folder / 'queued_again').read_text() == 'requeue 7_2\n'


@pytest.mark.parametrize('act, number, code', [
    (dict(SAVES, on_term='exit 0'), signal.SIGUSR1, 0),  # it had finished
    (dict(SAVES, on_term='exit 1'), signal.SIGUSR1, 1),  # it had diverged
    (dict(act='sleep 0.3; exit 143'), signal.SIGTERM, 143)])  # cancelled or preempted: SLURM tells Python too
def test_a_job_that_ends_otherwise_is_not_queued_again(cluster, act, number, code):
  folder, submit = cluster
  assert signalled(folder, submit('slurm.sbatch', **act), number) == code
  assert not (folder / 'queued_again').exists()


@pytest.mark.parametrize('code', [0, 1, 3])
def test_a_job_has_the_exit_code_of_the_run(cluster, code):
  folder, submit = cluster
  assert submit('slurm.sbatch', act=f'exit {code}').wait(timeout=30) == code
  assert not (folder / 'queued_again').exists()


STUDY = """k1     --config.model.moe.router.select.k=1
seed7  --config.seed=7 --config.training.steps=20
names  --config.data.files="['a b.txt']" '--config.x=(1, 2)'
plain
"""


@pytest.mark.parametrize('task, name, flags', [
    (1, 'k1', ['--config.model.moe.router.select.k=1']),
    (2, 'seed7', ['--config.seed=7', '--config.training.steps=20']),
    (3, 'names', ["--config.data.files=['a b.txt']", '--config.x=(1, 2)']), (4, 'plain', [])])
def test_a_task_of_an_array_is_the_run_of_its_line(cluster, task, name, flags):
  folder, submit = cluster
  (folder / 'study.txt').write_text(STUDY)
  job = submit('slurm_array.sbatch', 'study.txt', 'runs/my study', '--config=c.py', SLURM_ARRAY_TASK_ID=str(task))
  assert job.wait(timeout=30) == 0
  # The line comes last: of two flags for one key the later wins.
  assert called(folder) == ['-m', 'moejax.train', f'--workdir=runs/my study/{name}', '--config=c.py', *flags]


@pytest.mark.parametrize('task, said', [
    ('5', 'study.txt has no run in line 5: --array counts its lines from 1'), ('0', ''),
    ('', 'submit with sbatch --array=1-N')])
def test_a_task_without_a_line_starts_nothing(cluster, task, said):
  folder, submit = cluster
  (folder / 'study.txt').write_text(STUDY)
  job = submit('slurm_array.sbatch', 'study.txt', 'runs', SLURM_ARRAY_TASK_ID=task)
  _, errors = job.communicate(timeout=30)
  assert job.returncode != 0 and said in errors and not (folder / 'called').exists()


def test_the_follower_evaluates(cluster):
  folder, submit = cluster
  assert submit('slurm_follow.sbatch', '--workdir=runs/a').wait(timeout=30) == 0
  assert called(folder) == ['-m', 'moejax.evaluate', '--follow', '--workdir=runs/a']


# ---- GKE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('script, command', [
    ('gke_xpk.sh', 'moejax.train'), ('gke_xpk_follow.sh', 'moejax.evaluate --follow')])
def test_a_workload_runs_its_command_with_the_flags_quoted(tmp_path, script, command):
  fake(tmp_path, xpk='printf "%s\\n" "$@" > called')
  environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'CLUSTER': 'c', 'TPU_TYPE': 'v5litepod-4'}
  subprocess.run([LAUNCH / script, 'name', "--workdir=/mnt/a b"], cwd=tmp_path, env=environment, check=True, timeout=30,
                 stdout=subprocess.DEVNULL)
  assert '--workload=name' in called(tmp_path)
  assert called(tmp_path)[-1].endswith(f"exec python -m {command} '--workdir=/mnt/a b'")
