"""Whether reflections look: the same first thoughts, with other images in place of the first ones.

  python benchmarks/looking.py
  python benchmarks/looking.py --checkpoint out/mini2/checkpoint --world 2 --prompts 128

Draws first rounds of a mini world's test, then lets the model reflect on its own image, on a flat
grey one, and on the image of another prompt. Prints the share of reflections that find a fault, and
the shares whose cells are those of the plan, and those that the verifier sees. A model that looks
finds faults in other images.
"""

import argparse
import dataclasses

import numpy as np

import irg_jax
from irg_jax.mini import benchmark, thoughts, verifier
from irg_jax.mini.world import WORLD1, WORLDS


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", help="folder; the package's without it")
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--world", choices=WORLDS, default=WORLD1.name)
  args = parser.parse_args()
  irg_jax.keep_programs()
  loaded, mini = irg_jax.load(args.checkpoint), benchmark.MINIS[args.world]
  items = benchmark.select(args.prompts, 0, 1, mini)
  settings = dataclasses.replace(loaded.settings, rounds=2)
  prompts, seeds = [item.prompt for item in items], range(len(items))
  draw = lambda settings, **given: loaded.batch(
      prompts, seeds, settings, loaded.defaults.system_prompt, size=len(items), **given)
  first = [t.rounds[0] for t in draw(dataclasses.replace(settings, rounds=1))]
  images = [row.image for row in first]
  grey = np.full_like(images[0], 127)
  for name, shown in (("its own", images), ("flat grey", [grey] * len(images)),
                      ("another prompt's", images[1:] + images[:1])):
    given = [dataclasses.replace(row, image=image) for row, image in zip(first, shown)]
    texts = [t.rounds[1].thought.text for t in draw(settings, done=[given])]
    seen = [thoughts.read_seen(text) for text in texts]
    doubts = np.mean([bool(thoughts.read_faults(text)) for text in texts])
    planned = np.mean([thoughts.read_grid(row.thought.text) == cells
                       for row, cells in zip(first, seen)])
    there = np.mean([benchmark.seen_grid(verifier.look(image, mini.world)) == cells
                     for image, cells in zip(shown, seen)])
    print(f"{name:17} | finds a fault {doubts:.3f} | sees what was planned {planned:.3f} "
          f"| what is there {there:.3f}")


if __name__ == "__main__":
  main()
