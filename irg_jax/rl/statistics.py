"""Figures of an iteration for logs, its line in the terminal, and sample images."""

import numpy as np

from irg_jax.generate import stopping
from irg_jax.rl import rewards as rewards_lib


def of_rollouts(rollouts, rewards: dict, settings, stops: bool = False) -> dict[str, float]:
  """Figures of trajectories and their rewards [N, rounds] by name, where they have a value.

  `stops` says that a trajectory may keep its image.

  Returns:
    "reward/roundN", of the mixture, also by task, and of each of several rewards; what became of
    images from one round to the next; shares of thoughts; tokens of a thought; with `stops`, the
    share that stopped in a round, and the share of right ones among them.
  """
  found, reward = {}, rewards_lib.mixed(rewards, settings.reward)
  tags = np.array([str(r.record.get("tag", "")) for r in rollouts])
  each = {f"reward/{name}": values for name, values in rewards.items() if len(rewards) > 1}
  for name, values in ({"reward": reward} | each).items():
    for number, column in enumerate(values.T, 1):
      found[f"{name}/round{number}"] = _mean(column)
  for tag in sorted(set(tags) - {""}):
    for number, column in enumerate(reward.T, 1):
      found[f"reward/round{number}/{tag}"] = _mean(column[tags == tag])
  found["rewards_missing"] = float(np.isnan(reward).mean())
  groups = reward.reshape(-1, settings.group, reward.shape[1])
  found["groups_alike"] = float((np.nanmax(groups, 1, initial=-np.inf)
                                 <= np.nanmin(groups, 1, initial=np.inf)).mean())
  for number in range(1, reward.shape[1]):
    before, after = (reward[:, i] >= settings.right for i in (number - 1, number))
    both = ~np.isnan(reward[:, number - 1]) & ~np.isnan(reward[:, number])
    name = "" if reward.shape[1] == 2 else f"/round{number + 1}"
    found[f"right_made_wrong{name}"] = _mean(~after[both & before])
    found[f"wrong_made_right{name}"] = _mean(after[both & ~before])
  if stops:
    found |= _stops(rollouts, reward, settings.right)
  thoughts = [entry.thought for r in rollouts for entry in stopping.own(r.trajectory.rounds)]
  found |= {"thoughts/tokens": _mean([len(t.ids) for t in thoughts]),
            "thoughts/broken_off": _mean([t.hit_limit for t in thoughts]),
            "thoughts/read_otherwise": _mean([not t.as_sampled for t in thoughts])}
  return {name: x for name, x in found.items() if not np.isnan(x)}


def _stops(rollouts, reward, right):
  last = np.array([len(stopping.own(r.trajectory.rounds)) for r in rollouts])
  kept, found = np.array([r.trajectory.rounds[-1].kept for r in rollouts]), {}
  for number in range(2, reward.shape[1] + 1):
    here, worth = kept & (last == number), reward[:, number - 1]
    found[f"stopped/round{number}"] = _mean(here)
    found[f"stopped_right/round{number}"] = _mean((worth >= right)[here & ~np.isnan(worth)])
  return found


def line(values: dict, brief: bool) -> str:
  """The line of an iteration in the terminal."""
  rounds = [values[name] for name in sorted(values) if name.startswith("reward/round")
            and name.count("/") == 1]
  shown = f"reward {', '.join(f'{x:.3f}' for x in rounds)}"
  if brief:
    return shown
  names = ("loss", "entropy", "divergence/text", "divergence/image", "clipped/text",
           "clipped/image", "grad_norm")
  parts = [f"{name} {values[name]:.3g}" for name in names if name in values]
  took = ", ".join(f"{name.partition('/')[2]} {x:.0f} s" for name, x in values.items()
                   if name.startswith("seconds/"))
  return f"{'; '.join([shown, *parts])} ({took})"


def samples(rollouts, reward) -> tuple[dict, str]:
  """(values for the curves, line in the terminal): the images of the first trajectory."""
  first, values = rollouts[0].trajectory, {}
  rounds = stopping.own(first.rounds)
  for number, entry in enumerate(rounds, 1):
    values[f"samples/round{number}"] = entry.image
  thoughts = [f"round {n}: {entry.thought.text}" for n, entry in enumerate(rounds, 1)]
  values["samples/thoughts"] = "\n\n".join([first.prompt, *thoughts])
  told = ", ".join(f"{x:.3f}" for x in reward[0][:len(rounds)])
  return values, f"sample images of {first.prompt!r}, rewards {told}"


def _mean(values):
  return float(np.nanmean(values)) if np.size(values) and not np.isnan(values).all() else np.nan
