"""Rewards: plain functions (record of the prompt, trajectory) -> number, one file each.

A function judges the trajectory's last image; it is given the trajectory up to each round in turn,
and never more than the round that kept its image, whose reward the rounds after it have, too.
A trajectory is `irg.Trajectory`: `rounds[-1].image` is uint8 [height, width, 3],
`rounds[-1].thought.text` what was thought before it. NaN means that there is no reward, which
counts for nothing. A function with an attribute `many`, (records, trajectories) -> numbers, is
asked for all at once.

Named ones are here and in worlds, which register theirs. FILE.py:FUNCTION is the user's.
"""

import contextlib
import math
import runpy
from collections.abc import Callable

import numpy as np

from irg_jax import storage
from irg_jax.generate import stopping
from irg_jax.generate.irg import Trajectory
from irg_jax.messages import guess
from irg_jax.rl.rewards import judge

# name -> context manager of (settings, folder of the run), that yields the function.
REGISTERED: dict[str, Callable] = {"judge": judge.opened}


def register(name: str, function) -> None:
  """Adds a reward that needs nothing to be opened."""
  REGISTERED[name] = lambda settings, out: contextlib.nullcontext(function)


def of_trajectories(functions: dict[str, Callable], records,
                    trajectories) -> dict[str, np.ndarray]:
  """{name: rewards} of trajectories with equally many rounds, float64 [N, rounds].

  ValueError names a reward that is no number.
  """
  return {name: _by_round(name, function, records, trajectories)
          for name, function in functions.items()}


def _by_round(name, function, records, trajectories):
  """Rewards [N, rounds]. After a round that kept its image there is nothing new to ask about."""
  many = getattr(function, "many", lambda *args: list(map(function, *args)))
  found = np.full((len(trajectories), len(trajectories[0].rounds)), np.nan)
  for number in range(found.shape[1]):
    cut = [Trajectory(t.prompt, stopping.own(t.rounds[:number + 1])) for t in trajectories]
    new = [i for i, trajectory in enumerate(cut) if len(trajectory.rounds) == number + 1]
    values = many([records[i] for i in new], [cut[i] for i in new]) if new else []
    for i, value in zip(new, values, strict=True):
      if not isinstance(value, (int, float, np.number, np.bool_)) or math.isinf(value):
        raise ValueError(f"reward {name!r} gave {value!r:.80}, which is no finite number")
      found[i, number:] = value
  return found


def mixed(found: dict[str, np.ndarray], mixture: str) -> np.ndarray:
  """The sum of rewards with the weights of a mixture; NaN where one of them is NaN."""
  return sum(weight * found[name] for name, weight in parse(mixture).items())


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
  """Yields {name: function} of all rewards of `settings`; `out` is the folder of the run.

  ValueError names the reward that cannot be opened.
  """
  with contextlib.ExitStack() as stack:
    yield {name: user(name) if ".py:" in name else
           stack.enter_context(REGISTERED[name](settings, out)) for name in names(settings)}


def names(settings) -> dict[str, float]:
  """The names of all rewards of `settings`, of both tracks; raises as `parse`."""
  tracks = settings.reward, settings.text.reward, settings.image.reward
  return {name: weight for mixture in tracks for name, weight in parse(mixture).items()}


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
