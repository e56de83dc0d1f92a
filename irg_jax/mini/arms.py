"""The arms of a run's report, as files/report.toml lists them: what draws the test."""

import dataclasses
import json
import pathlib
import tomllib

import jax

from irg_jax.evaluate import records
from irg_jax.generate import generator, irg
from irg_jax.mini import benchmark
from irg_jax.train import logs

WORDING = tomllib.loads((benchmark.FILES / "report.toml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Arm:
  """A checkpoint on the test; files/report.toml explains the fields."""

  name: str
  title: str
  weights: str
  rounds: int
  think: bool = True
  without: str = ""
  blind: bool = False


ARMS = tuple(Arm(**arm) for arm in WORDING["arms"])
CONTROLS = tuple(Arm(**arm) for arm in WORDING["controls"])  # of `controls.run_controls`
FINAL = ARMS[-1]
_TRAINED_AS = {"checkpoint": "irgl"}  # folder of weights -> folder of the training


def blind(loaded: generator.Generator, prompts, seeds, settings, system_prompt: str, *, size: int,
          **options) -> list[irg.Trajectory]:
  """`Generator.batch` of two rounds whose second thought is written without the first image.

  The second image is drawn after both, as ever. Training sometimes drops the image before a
  reflection, so such a context is not new to the model.
  """
  padded = lambda rows: [*rows, *[rows[-1]] * (size - len(rows))]
  drawn = loaded.batch(prompts, seeds, dataclasses.replace(settings, rounds=1), system_prompt,
                       size=size, **options)
  first = [trajectory.rounds[0] for trajectory in drawn]
  texts = [loaded.defaults.read(prompt, settings).text for prompt in prompts]
  with jax.set_mesh(loaded.mesh):
    job = irg.prepare(loaded.model, loaded.params, loaded.tokenizer, padded(texts),
                      seeds=padded(seeds), settings=settings, system_prompt=system_prompt)
    ctx = irg.read_thoughts(job, irg.begin(job), [row.thought for row in padded(first)],
                            after_image=False)
    thoughts = irg.think(job, ctx, 1)[:len(prompts)]
  second = [irg.Round(thought, None, None, {}) for thought in thoughts]
  return loaded.batch(prompts, seeds, settings, system_prompt, size=size, done=[first, second],
                      **options)


def read_training(out: pathlib.Path, arm: Arm) -> dict | None:
  """{"updates", "rows", "seconds"} of an arm's training after the base model, from its log.

  None where nothing was trained, or the log is gone. Seconds are those of updates alone, without
  compilation. A stage counts with all before it.
  """
  training, *stage = pathlib.PurePath(arm.weights).parts
  path = out / _TRAINED_AS.get(training, training) / logs.FILE
  if training == "base" or not path.is_file():
    return None
  steps = {}
  for _, line in records.read_lines(path):
    if "samples" in line:
      steps[line["stage"], line["step"]] = line  # the last one, if it was made again
  last = stage[0] if stage else "stage2"
  counted = [line for (name, _), line in steps.items() if name <= last]
  return {"updates": len(counted), "rows": sum(len(line["samples"]) for line in counted),
          "seconds": sum(line["seconds"] or 0 for line in counted)}
