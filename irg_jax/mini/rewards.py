"""The mini world for learning from rewards: its verifier as a reward, and prompts to train on."""

import functools

from irg_jax.mini import verifier, world
from irg_jax.rl import prompts, rewards


def right(record: dict, trajectory) -> float:
  """1 if the last image shows exactly what the record says, else 0."""
  return float(verifier.score(trajectory.rounds[-1].image, record).correct)


def nearly(record: dict, trajectory) -> float:
  """1 for a right image, 1/2 for one fault, 1/3 for two, and so on."""
  return 1 / (1 + len(verifier.score(trajectory.rounds[-1].image, record).faults))


rewards.register("verifier", right)
rewards.register("faults", nearly)
for _name, _world in world.WORLDS.items():
  prompts.register("mini" if _name == world.WORLD1.name else f"mini-{_name}",
                   functools.partial(world.training_record, world=_world))
