"""Quality of cheaper denoising: the mini world's test with each option, paired.

  python benchmarks/quality.py
  python benchmarks/quality.py --prompts 300 --options full 3,2,4 4,1,3 --json quality.json

Draws prompts of the mini world's test with the default model, once for each option, with the same
seeds. An option is "full", or a forecast INTERVAL,ORDER,FIRST (docs/settings.md, `forecast`), or "int8"
for weights of 8 bits, or both: "int8:3,2,3".
Prints for each round the share of images that show exactly what was asked for, its difference to
the full run with a 95 % interval (paired over prompts), the mean difference of pixels to the full
run in levels, the passes of the decoder, and the seconds of denoising relative to the full run's,
which alternates with the others so that a busy machine slows all alike.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
from scipy import stats

import irg_jax
from irg_jax.generate.settings import Forecast
from irg_jax.mini import benchmark, verifier

OPTIONS = ("full", "2,1,4", "2,2,4", "3,0,4", "3,1,4", "3,2,4", "3,2,5", "3,3,4", "4,1,3", "4,2,3",
           "5,2,3", "int8", "int8:3,2,3")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=240)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--options", nargs="+", default=OPTIONS)
  parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
  args = parser.parse_args()
  irg_jax.keep_programs()
  kinds = {name: "int8" if name.startswith("int8") else None for name in ("full", *args.options)}
  loaded = {kind: irg_jax.load(weights=kind) for kind in set(kinds.values())}
  found = by_option(args.options, args.prompts, args.batch_size, lambda batch, name: draw(
      loaded[kinds[name]], batch, name.removeprefix("int8").removeprefix(":"), args.batch_size))
  table = [line(name, rows, found["full"]) for name, rows in found.items()]
  for row in table:
    print(" | ".join(row.values()))
  if args.json:
    args.json.write_text(json.dumps(table, indent=1) + "\n")


def by_option(options, prompts: int, batch_size: int, draw) -> dict[str, list]:
  """Results of `draw(batch, option)` for prompts of the test, by option, "full" first.

  A batch is [(number, item)]; the options alternate.
  """
  items = benchmark.MINI.read()
  rows = np.random.default_rng(0).permutation(len(items))[:prompts]
  found = {name: [] for name in ("full", *options)}
  for start in range(0, len(rows), batch_size):
    batch = [(int(i), items[i]) for i in rows[start:start + batch_size]]
    for name in found:
      found[name] += draw(batch, name)
    print(f"{start + len(batch)} of {len(rows)} prompts", flush=True)
  return found


def draw(loaded, batch, name, size):
  """[(record of the prompt's verdicts, images, passes, seconds of denoising)] by prompt."""
  settings = loaded.settings
  if name not in ("full", ""):
    interval, order, first = map(int, name.split(","))
    settings = dataclasses.replace(settings, forecast=Forecast(interval, order, first))
  drawn = loaded.batch([item.prompt for _, item in batch], [number for number, _ in batch],
                       settings, loaded.defaults.system_prompt, size=size)
  return [([verifier.score(r.image, item.extra).correct for r in trajectory.rounds],
           [r.image.astype(float) for r in trajectory.rounds],
           [r.passes for r in trajectory.rounds],
           [r.seconds["draw"] for r in trajectory.rounds])
          for (_, item), trajectory in zip(batch, drawn)]


def line(name, found, full):
  """One row of the table, texts by column."""
  right, whole = (np.array([x[0] for x in rows], float) for rows in (found, full))
  off = np.array([[np.abs(a - b).mean() for a, b in zip(x[1], y[1])]
                  for x, y in zip(found, full)])
  seconds, base = (np.array([x[3] for x in rows]) for rows in (found, full))
  row = {"option": f"{name:8}", "passes": "+".join(map(str, found[0][2]))}
  for i in range(right.shape[1]):
    row |= {f"right {i + 1}": f"{right[:, i].mean():.3f}",
            f"difference {i + 1}": interval(right[:, i] - whole[:, i]),
            f"levels {i + 1}": f"{off[:, i].mean():.2f}"}
  faster = np.median(base.sum(1) / seconds.sum(1))
  return row | {"denoising": f"{faster:.2f} times as fast"}


def interval(differences):
  """Mean with a 95 % interval by bootstrap over prompts."""
  mean = differences.mean()
  if np.ptp(differences) == 0:
    return f"{mean:+.3f}"
  low, high = stats.bootstrap((differences,), np.mean, method="percentile",
                              rng=np.random.default_rng(0)).confidence_interval
  return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
  main()
