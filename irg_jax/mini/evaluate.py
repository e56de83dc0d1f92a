"""Draws and scores the mini world's test with the checkpoints of a run, an arm each.

  OUT/evaluation/ARM/...         as `irg eval generate mini` and `irg eval score mini` leave it
  OUT/evaluation/ARM/cost.json   the memory that it took
  OUT/evaluation/autoencoder.json   painted images of the test that its round trip keeps right
"""

import dataclasses
import json
import pathlib
import resource
import sys

import numpy as np

from irg_jax import weights
from irg_jax.evaluate import base, generate, score
from irg_jax.storage import atomic_file
from irg_jax.generate import defaults
from irg_jax.mini import benchmark
from irg_jax.mini import vae

FOLDER, COST, AUTOENCODER = "evaluation", "cost.json", "autoencoder.json"
_SCENES = 2  # of each prompt, for the autoencoder


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way of drawing the test.

  Attributes:
    weights: the checkpoint's folder in that of the run.
    rounds: images of a prompt, each after a thought of its own.
    think: if not, the image follows the prompt at once, without a system prompt.
  """

  name: str
  title: str
  weights: str
  rounds: int
  think: bool = True


ARMS = (
    Arm("base_direct", "base, no thinking", "base/stage2/weights", 1, think=False),
    Arm("base", "base, thinking", "base/stage2/weights", 1),
    Arm("quality", "better images only", "quality/stage2/weights", 1),
    Arm("stage1", "stage 1", "irgl/stage1/weights", 2),
    Arm("irg", "stage 2", "checkpoint", 4),
)
FINAL = ARMS[-1]


@dataclasses.dataclass(frozen=True)
class Size:
  """How much of the test is drawn: prompts of each split, images of a prompt, side by side."""

  seen: int = benchmark.SPLITS["seen"]
  unseen: int = benchmark.SPLITS["unseen"]
  images: int = 4
  batch_size: int = 64

  def select(self, items) -> list[base.Item]:
    """The first prompts of each split, in the order of the file."""
    split = lambda name: [item for item in items if item.extra["split"] == name]
    chosen = split("seen")[:self.seen] + split("unseen")[:self.unseen]
    return [dataclasses.replace(item, images=min(self.images, item.images))
            for item in chosen]


def size_of(settings: dict) -> Size:
  """The `Size` of a run's settings, as its mini.json has them."""
  return Size(settings["test_seen"], settings["test_unseen"], settings["test_pictures"],
              settings["sample_batch"])


def evaluate(out, size: Size, arms=ARMS, checkpoint=None) -> None:
  """Draws what is missing of each arm, and scores it; and the autoencoder alone.

  Args:
    out: folder of the run.
    checkpoint: used for all arms in place of the run's own.

  Raises:
    ValueError: an arm's weights are not there, or it was drawn with others.
  """
  out = pathlib.Path(out)
  for arm in arms:
    folder = pathlib.Path(checkpoint or out / arm.weights)
    if not folder.is_dir():
      raise ValueError(f"{folder}: no such folder; the run in {out} is not finished, go on with "
                       "irg mini run")
    print(f"irg mini: drawing the test, {arm.title}", flush=True)
    draw(arm, folder, out / FOLDER / arm.name, size)
    score_new(out / FOLDER / arm.name)
  measure_autoencoder(folder, out / FOLDER, size)  # frozen: any arm has the same


def draw(arm: Arm, checkpoint, folder: pathlib.Path, size: Size) -> None:
  """Draws the images of an arm that are not there yet, with the checkpoint's own settings."""
  settings, system_prompt = defaults.read(checkpoint)
  items = benchmark.MINI.read()
  result = generate.generate_images(generate.Request(
      benchmark=benchmark.MINI, items=tuple(items), selected=tuple(size.select(items)), out=folder, checkpoint=checkpoint,
      settings=dataclasses.replace(settings, rounds=arm.rounds, think=arm.think),
      system_prompt=system_prompt if arm.think else "", batch_size=size.batch_size))
  if result.drawn:
    cost = {"peak_bytes": _peak_bytes(), "batch_size": size.batch_size}
    with atomic_file(folder / COST) as aside:
      aside.write_text(json.dumps(cost))


def score_new(folder) -> None:
  """Lets the verifier judge an arm's images, unless this very verifier has judged all of them."""
  images = score.open_folder(benchmark.MINI, folder)
  there, path = list(score.images_there(images)), images.out / score.SCORES
  if path.is_file():
    before = json.loads(path.read_text(encoding="utf-8"))
    judged = sum(r["pictures"] + r["unscored"]["total"] for r in before["rounds"].values())
    if before["protocol"] == benchmark.protocol() and judged == len(there):
      return
  benchmark.MINI.score(images)


def measure_autoencoder(checkpoint, folder: pathlib.Path, size: Size) -> None:
  """Paints scenes of the test's prompts and counts those that the round trip keeps right."""
  if (folder / AUTOENCODER).is_file():
    return
  config, params = weights.load_checkpoint(checkpoint, part="vae", dtype="float32",
                                           compute_dtype="float32")
  records = [item.extra for item in size.select(benchmark.MINI.read()) for _ in range(_SCENES)]
  right = vae.round_trip(config.vae, params["vae"], records, np.random.default_rng(0))
  with atomic_file(folder / AUTOENCODER) as aside:
    aside.write_text(json.dumps({"right": int(right.sum()), "pictures": len(right)}))


def _peak_bytes():
  """Of this process, from its start to now."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak
