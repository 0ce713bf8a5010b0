"""The table of injected faults and their results."""
from experiments.faults import kinds


def table(results: dict) -> str:
  """Markdown, with the command that made it."""
  head = 'fault', 'injected', 'survived', 'steps lost: mean (most)', 'runs whose metrics are identical'
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for name in dict.fromkeys(run['kind'] for run in results['runs']):
    runs = [run for run in results['runs'] if run['kind'] == name]
    injected = sum(run['injected'] for run in runs)
    lost = [steps for run in runs for steps in run['lost']]
    cost = f'{sum(lost) / len(lost):.1f} ({max(lost)})' if lost else 'did not stop'
    survived = injected - sum(bool(run['problems']) for run in runs)
    identical = sum(run['identical'] for run in runs)
    lines.append(f'| {kinds.named(name).name} | {injected} | {survived} | {cost} | {identical} of {len(runs)} |')
  kills = sum(run['injected'] for run in results['runs'] if run['kind'] in kinds.KILLS)
  commits = ', '.join(dict.fromkeys(run['commit'] for run in results['runs']))
  run = results['runs'][-1]
  return '\n'.join(lines) + (
      f'\n\n{kills} kills. A checkpoint every {kinds.EVERY} steps. Identical: every number of every logged step, to '
      f'the last bit, but what a clock measured. `{results["command"]}`, commit {commits}, {run["machine"]}, '
      f'Python {run["python"]}, jax {run["jax"]}.')
