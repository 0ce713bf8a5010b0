"""The measurements: programs, each a function at one shape, and cases, programs that are timed in the same rounds.

Plain Python without JAX, because the peers' processes import it too.
"""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Program:
  """A function that is compiled and timed.

  Attributes:
    what: 'dense': the floor, a feed-forward on K*T rows; a sparse layer by its dispatcher ('einsum', 'gather',
      'grouped', or 'capacity': 'grouped' for a router with capacity), its grouped matmul ('ragged_dot', 'tokamax') or
      its peer ('mixtral_eager', 'mixtral_grouped_mm'); 'block': `kernels.expert_block` with given routes; or 'routing':
      a layer whose experts do nothing.
    backward: whether to compute the gradients of parameters and input too.
    num_experts: E; 1 for the floor.
    choices: K.
    tokens: T.
    dim: D.
    hidden: F.
    activation: 'gelu' or 'swiglu'.
    load: distribution of the routes of a 'block' over experts, one of LOADS; '' if a router decides.
  """
  what: str
  backward: bool
  num_experts: int
  choices: int
  tokens: int
  dim: int
  hidden: int
  activation: str = 'gelu'
  load: str = ''

  @property
  def key(self) -> str:
    """The name of the program in results."""
    passes = 'forward and backward' if self.backward else 'forward'
    shape = f'E={self.num_experts} K={self.choices} T={self.tokens} D={self.dim} F={self.hidden} {self.activation}'
    return ' '.join(filter(None, (self.what, shape, self.load, passes)))

  @property
  def floor(self) -> 'Program':
    """The dense feed-forward with equal active FLOPs."""
    return dataclasses.replace(self, what='dense', num_experts=1, load='')


@dataclasses.dataclass(frozen=True)
class Size:
  """Shapes of a whole run; `experts` has the values of E, `rounds` is the number of timings of each program."""
  tokens: int
  dim: int
  hidden: int
  experts: tuple[int, ...]
  rounds: int
  slow_rounds: int

  def program(self, what: str, num_experts: int = 1, backward: bool = True, choices: int = 2, tokens: int | None = None,
              activation: str = 'gelu', load: str = '') -> Program:
    """A program at this size."""
    return Program(what, backward, num_experts, choices, tokens or self.tokens, self.dim, self.hidden, activation, load)

  @property
  def middle(self) -> int:
    """The E for measuring growth with everything else."""
    return self.experts[len(self.experts) // 2]

  @property
  def token_counts(self) -> tuple[int, ...]:
    """The values of T for measuring growth with T."""
    return self.tokens // 4, self.tokens, self.tokens * 4


FULL = Size(tokens=4096, dim=256, hidden=1024, experts=(8, 32, 64), rounds=31, slow_rounds=3)
QUICK = Size(tokens=64, dim=8, hidden=16, experts=(4, 8), rounds=2, slow_rounds=2)
CHOICES = 1, 2, 4
LOADS = 'balanced', 'multinomial', 'zipf'
DISPATCHERS = 'einsum', 'gather', 'capacity', 'grouped'


@dataclasses.dataclass(frozen=True)
class Case:
  """Programs by process, each timed once per round, one at a time."""
  rounds: int
  programs: dict[str, tuple[Program, ...]]


def cases(size: Size) -> dict[str, Case]:
  """All cases. The processes: 'moejax', and the peers 'ragged_dot', 'tokamax' and 'torch'."""
  def with_floors(*programs):
    # Everything is a ratio to the floor in the same process and round.
    return tuple(dict.fromkeys([*(program.floor for program in programs), *programs]))

  def both(what, **shape):
    return tuple(size.program(what, backward=backward, **shape) for backward in (False, True))

  def swiglu(*whats):
    return with_floors(*(program for experts in size.experts for what in whats
                         for program in both(what, num_experts=experts, activation='swiglu')))

  layers = [program for experts in size.experts for program in (
      *(program for what in (*DISPATCHERS, 'routing') for program in both(what, num_experts=experts)),
      *both('block', num_experts=experts, load='multinomial'))]
  # Programs that do E times the work are skipped for many experts.
  expanded = lambda what, count, **shape: [p for experts in size.experts[:count]
                                           for p in both(what, num_experts=experts, **shape)]
  growth = lambda **shape: [size.program(what, size.middle, **shape) for what in ('gather', 'grouped')]
  return {
      'layers': Case(size.rounds, {'moejax': with_floors(*layers)}),
      'slow': Case(size.slow_rounds, {
          'moejax': with_floors(*expanded('grouped', 2)), 'ragged_dot': with_floors(*expanded('ragged_dot', 2)),
          'tokamax': with_floors(*expanded('tokamax', 1)),
          'torch': with_floors(*expanded('mixtral_eager', 2, activation='swiglu'))}),
      'swiglu': Case(size.rounds, {'moejax': swiglu('grouped'), 'torch': swiglu('mixtral_grouped_mm')}),
      'choices': Case(size.rounds, {'moejax': with_floors(*(p for k in CHOICES for p in growth(choices=k)))}),
      'tokens': Case(size.rounds, {'moejax': with_floors(*(p for t in size.token_counts for p in growth(tokens=t)))}),
      'load': Case(size.rounds, {'moejax': with_floors(
          *(size.program('block', size.middle, load=load) for load in LOADS))}),
  }
