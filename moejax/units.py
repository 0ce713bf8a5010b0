"""Human-readable numbers."""


def size(number: float) -> str:
  """Bytes with a binary prefix."""
  for power, unit in ((30, 'GiB'), (20, 'MiB'), (10, 'KiB')):
    if number >= 2**power:
      return f'{number / 2**power:.2f} {unit}'
  return f'{number:.0f} B'


def duration(seconds: float) -> str:
  """Seconds with a prefix."""
  for limit, unit in ((1, 's'), (1e-3, 'ms')):
    if seconds >= limit:
      return f'{seconds / limit:.2f} {unit}'
  return f'{seconds * 1e6:.2f} µs'


def short(number: float, unit: str = '') -> str:
  """A count of units with a decimal prefix."""
  for limit, suffix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= limit:
      return f'{number / limit:.2f} {suffix}{unit}'
  return f'{number:.0f} {unit}'.rstrip()
