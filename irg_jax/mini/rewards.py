"""The mini world for learning from rewards: its verifier as a reward, and prompts to train on."""

import functools

import numpy as np

from irg_jax.mini import benchmark, verifier, world
from irg_jax.rl import prompts, rewards


def right(record: dict, trajectory) -> float:
  """1 if the last image shows exactly what the record says, else 0."""
  return float(verifier.score(trajectory.rounds[-1].image, record).correct)


def nearly(record: dict, trajectory) -> float:
  """1 for a right image, 1/2 for one fault, 1/3 for two, and so on."""
  return 1 / (1 + len(verifier.score(trajectory.rounds[-1].image, record).faults))


def part_by_part(record: dict, trajectory) -> float:
  """Mean of the share of things that are right and the fidelity of shapes and fills, 0 to 1."""
  verdict = verifier.score(trajectory.rounds[-1].image, record)
  return float(np.mean(list(benchmark.parts(verdict).values())))


rewards.register("verifier", right)
rewards.register("faults", nearly)
rewards.register("parts", part_by_part)
for _name, _world in world.WORLDS.items():
  prompts.register("mini" if _name == world.WORLD1.name else f"mini-{_name}",
                   functools.partial(world.training_record, world=_world))
