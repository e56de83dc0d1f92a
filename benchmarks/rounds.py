"""Rounds of a mini world's model on prompts that are not of the test: for choices of a recipe.

  python benchmarks/rounds.py --checkpoint out/mini2/checkpoint --world 2
  python benchmarks/rounds.py --checkpoint out/mini2/checkpoint --world 2 --prompts 360 --rounds 3

Prompts are of all tasks in turn. Prints by task the share of right plans and images of each round;
then, for each later round, what became right and wrong, what the reflection sees where the image
differs from the plan, which faults it finds, and how often its final prompt is right.
"""

import argparse
import dataclasses
import itertools

import numpy as np

import irg_jax
from irg_jax.generate import generator
from irg_jax.mini import benchmark, thoughts, verifier
from irg_jax.mini import world as world_lib

SEED = 77  # of the prompts, for nothing else


def records(count: int, world) -> list[dict]:
  """Records of all tasks in turn, none of the test; training may have some prompt by chance."""
  rng = np.random.default_rng([SEED, 1])
  return [world_lib.training_record(rng, world, task)
          for task in itertools.islice(itertools.cycle(world.tasks), count)]


def planned_right(text: str, record: dict) -> bool:
  """Whether the cells of a thought are what the prompt asks for."""
  scene = thoughts.read_scene(text, world_lib.of(record))
  return scene is not None and verifier.judge_scene(scene, record).correct


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", help="folder; the package's without it")
  parser.add_argument("--world", choices=world_lib.WORLDS, default=world_lib.WORLD1.name)
  parser.add_argument("--prompts", type=int, default=180)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--temperature", type=float, help="of thoughts; the checkpoint's without it")
  args = parser.parse_args()
  irg_jax.keep_programs()
  loaded, given = irg_jax.load(args.checkpoint), records(
      args.prompts, world_lib.WORLDS[args.world])
  settings = dataclasses.replace(loaded.settings, rounds=args.rounds)
  if args.temperature is not None:
    settings = dataclasses.replace(settings, temperature=args.temperature)
  drawn, size = [], min(64, len(given))
  for numbers in generator.batches(len(given), size):
    drawn += loaded.batch([given[i]["prompt"] for i in numbers], numbers, settings,
                          loaded.defaults.system_prompt, size=size)
  rounds = [t.rounds for t in drawn]
  verdicts = [[verifier.score(r.image, record) for r in row] for row, record in zip(rounds, given)]
  right = np.array([[v.correct for v in row] for row in verdicts])
  plans = np.array([[planned_right(r.thought.text, record) for r in row]
                    for row, record in zip(rounds, given)])
  tags = np.array([record["tag"] for record in given])
  for task in [*dict.fromkeys(tags), "all"]:
    these = (tags == task) | (task == "all")
    print(f"{task:14} {these.sum():4} prompts | plan {plans[these, 0].mean():.3f} | images "
          + " ".join(f"{share:.3f}" for share in right[these].mean(0)))
  print(f"right images of right plans: {right[plans[:, 0], 0].mean():.3f}")
  for number in range(1, args.rounds):
    report_round(number, rounds, verdicts, right, plans)


def report_round(number, rounds, verdicts, right, plans):
  """Prints what a later round changed, and how well its reflections looked."""
  before, after = right[:, number - 1], right[:, number]
  looked, doubts = [], []
  for row, verdict in zip(rounds, verdicts):
    text = row[number].thought.text
    doubts.append(bool(thoughts.read_faults(text)))
    cells = (thoughts.read_seen(text), benchmark.seen_grid(verdict[number - 1].seen),
             thoughts.read_grid(row[number - 1].thought.text))
    looked += zip(*cells) if all(cells) else ()
  differ = np.array([said == shown for said, shown, planned in looked if shown != planned])
  doubts = np.array(doubts)
  print(f"round {number + 1}: {(after & ~before).sum()} of {(~before).sum()} wrong made right, "
        f"{(before & ~after).sum()} of {before.sum()} right made wrong")
  print(f"  sees {differ.mean():.3f} of {len(differ)} cells that are not as planned; "
        f"doubts {doubts[~before].mean():.3f} of wrong, {doubts[before].mean():.3f} of right images")
  print(f"  final prompts right: {plans[~before, number].mean():.3f} after a wrong image, "
        f"{plans[before, number].mean():.3f} after a right one")


if __name__ == "__main__":
  main()
