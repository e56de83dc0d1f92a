"""Rewards: plain functions (record of the prompt, trajectory) -> number, one file each.

A function judges the trajectory's last image; it is given the trajectory up to each round in turn.
A trajectory is `irg.Trajectory`: `rounds[-1].image` is uint8 [height, width, 3],
`rounds[-1].thought.text` what was thought before it. NaN means that there is no reward, which
counts for nothing. A function with an attribute `many`, (records, trajectories) -> numbers, is
asked for all at once.

Named ones are here and in worlds, which register theirs. FILE.py:FUNCTION is the user's.
"""

import contextlib
import dataclasses
import math
import runpy
from collections.abc import Callable

import numpy as np

from irg_jax import storage
from irg_jax.generate.irg import Trajectory
from irg_jax.messages import guess
from irg_jax.rl.rewards import judge

# name -> context manager of (settings, folder of the run), that yields the function.
REGISTERED: dict[str, Callable] = {"judge": judge.opened}


def register(name: str, function) -> None:
  """Adds a reward that needs nothing to be opened."""
  REGISTERED[name] = lambda settings, out: contextlib.nullcontext(function)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Rewards by name, with their weights."""

  functions: dict[str, Callable]
  weights: dict[str, float]

  def __call__(self, records, trajectories) -> dict[str, np.ndarray]:
    """{name: rewards} of trajectories with equally many rounds, float64 [N, rounds].

    "reward" is their sum with weights: NaN where one of them is NaN.
    """
    found, rounds = {}, len(trajectories[0].rounds)
    for name, function in self.functions.items():
      columns = [self._of_round(name, function, records, trajectories, number + 1)
                 for number in range(rounds)]
      found[name] = np.stack(columns, 1)
    return found | {"reward": sum(self.weights[name] * found[name] for name in self.functions)}

  def _of_round(self, name, function, records, trajectories, rounds):
    cut = [Trajectory(t.prompt, t.rounds[:rounds]) for t in trajectories]
    many = getattr(function, "many", lambda *args: list(map(function, *args)))
    values = many(records, cut)
    for value in values:
      if isinstance(value, bool | np.bool_):
        value = float(value)
      if not isinstance(value, (int, float, np.number)) or math.isinf(value):
        raise ValueError(f"reward {name!r} gave {value!r:.80}, which is no finite number")
    return np.array(values, np.float64)


def parse(text: str) -> dict[str, float]:
  """{name or FILE.py:FUNCTION: weight} of "verifier=1.0,judge=0.2"; without a weight it is 1.

  ValueError names the part that is wrong.
  """
  found = {}
  for part in filter(None, map(str.strip, text.split(","))):
    name, equals, weight = part.rpartition("=")
    name, weight = (name, weight) if equals else (part, "1")
    try:
      found[name] = float(weight)
    except ValueError:
      found[name] = math.nan
    if not math.isfinite(found[name]):
      raise ValueError(f"config field 'reward': {part!r} has no number as its weight; write "
                       "verifier=1.0,judge=0.2")
    if ".py:" not in name and name not in REGISTERED:
      raise ValueError(f"config field 'reward': {name!r} is no reward{guess(name, REGISTERED)}; "
                       f"known: {', '.join(REGISTERED)}, and FILE.py:FUNCTION")
  return found


@contextlib.contextmanager
def opened(settings, out):
  """Yields the `Mixture` of `settings.reward`; `out` is the folder of the run, for their files.

  ValueError names the reward that cannot be opened.
  """
  weights = parse(settings.reward)
  with contextlib.ExitStack() as stack:
    functions = {name: user(name) if ".py:" in name else
                 stack.enter_context(REGISTERED[name](settings, out)) for name in weights}
    yield Mixture(functions, weights)


def user(name: str):
  """The function of "FILE.py:FUNCTION"."""
  file, _, function = name.rpartition(":")
  path = storage.local_path(file)
  if not path.is_file():
    raise ValueError(f"config field 'reward': {file}: no such file")
  try:
    found = runpy.run_path(str(path))
  except Exception as e:  # any error of the file's own code
    raise ValueError(f"config field 'reward': {file}: {type(e).__name__}: {e}") from e
  if not callable(found.get(function)):
    raise ValueError(f"config field 'reward': {file} has no function {function!r}")
  return found[function]
