"""Trajectories of a run: the base model's first rounds, judged and improved, as rows of IRGL.

`settings` is a `run.Settings` throughout.
"""

import dataclasses
import json
import pathlib

import numpy as np

from irg_jax import storage
from irg_jax.data import parquet
from irg_jax.generate import generator, irg
from irg_jax.mini import datasets, thoughts, verifier
from irg_jax.mini.world import training_record
from irg_jax.progress import Progress

_WRONG = 0.3, 0.7  # share of wrong first images that trajectories should have


def sample_first_rounds(settings, checkpoint, out: pathlib.Path) -> None:
  """Thoughts and first images of training prompts, `out`/NNNNNN.npz for each batch."""
  out.mkdir(exist_ok=True)
  rng, size = datasets.generator(settings.seed, "trajectories"), settings.sample_batch
  records = [training_record(rng, settings.in_world) for _ in range(settings.trajectories)]
  with Progress() as progress:
    loaded = generator.load(checkpoint, on_progress=progress)
    for start in range(0, len(records), size):
      if (path := out / f"{start:06}.npz").exists():
        continue
      batch = records[start:start + size]
      batch += batch[:1] * (size - len(batch))  # another batch size would compile again
      drawn = loaded.batch([r["prompt"] for r in batch], range(start, start + size),
                           settings.first, thoughts.SYSTEM_PROMPT, size=size)
      firsts = [trajectory.rounds[0] for trajectory in drawn]
      pictures = drawn_otherwise(settings, loaded, batch, firsts, start)
      with storage.atomic_file(path) as aside, aside.open("wb") as file:
        np.savez(file, records=json.dumps(batch), thoughts=[r.thought.text for r in firsts],
                 pictures=np.stack(pictures))
      progress("drawing first images", 0, start + size, len(records))


def drawn_otherwise(settings, loaded, batch, firsts, start: int) -> list[np.ndarray]:
  """The images of first rounds; a share `altered_plans` is drawn again, after other plans."""
  rng, given = np.random.default_rng([settings.seed, len(datasets.PURPOSES), start]), []
  for record, first in zip(batch, firsts):
    text = rng.random() < settings.altered_plans and datasets.altered_plan(
        record, first.thought.text, rng)
    thought = irg.Thought(text, tuple(loaded.tokenizer.encode(text))) if text else first.thought
    given.append(dataclasses.replace(first, thought=thought, latents=None, image=None))
  if all(a.thought is b.thought for a, b in zip(given, firsts)):
    return [first.image for first in firsts]
  again = loaded.batch([r["prompt"] for r in batch], range(start, start + len(batch)),
                       settings.first, thoughts.SYSTEM_PROMPT, size=len(batch), done=[given])
  return [first.image if new.thought is first.thought else trajectory.rounds[0].image
          for first, new, trajectory in zip(firsts, given, again)]


def write_trajectories(settings, out: pathlib.Path) -> None:
  """Writes the rows of all usable first images, and their numbers in trajectories.json.

  ValueError gives the reasons where no image can be used.
  """
  counts = {"right": 0, "wrong": 0}
  with storage.atomic_folder(out / "trajectories") as folder:
    parquet.write(folder, trajectory_rows(settings, out / "first_rounds", counts))
    if not counts["right"] + counts["wrong"]:
      raise ValueError(f"none of the base model's first images can be used ({counts}): train "
                       "the autoencoder and the base longer")
  storage.write_json(out / "trajectories.json", counts)
  print(f"irg mini: first images of the base model: {counts}")
  share = counts["wrong"] / (counts["right"] + counts["wrong"])
  if not _WRONG[0] <= share <= _WRONG[1]:
    print(f"irg mini: {share:.0%} of them are wrong; a second round is learned best if it is "
          f"{_WRONG[0]:.0%} to {_WRONG[1]:.0%}: see the settings first_temperature and "
          "altered_plans, and the steps of the base")


def trajectory_rows(settings, folder: pathlib.Path, counts: dict[str, int]):
  """Yields (mode, conversation) of all usable first images: six modes, and replayed text.

  `folder` is that of `sample_first_rounds`. Adds to `counts` the numbers of images by verdict, or
  by the reason why they cannot be used.
  """
  rng, left = datasets.generator(settings.seed, "better"), settings.trajectories
  for path in sorted(folder.glob("*.npz")):
    batch = np.load(path)
    rows = zip(json.loads(str(batch["records"])), batch["thoughts"], batch["pictures"])
    for record, plan, image in list(rows)[:left]:
      try:
        verdict = verifier.score(image, record)
        better = thoughts.improve(record, verdict, rng)
        modes = list(datasets.trajectory_rows(record, str(plan), image, verdict, better, rng))
      except thoughts.Inexpressible as e:
        counts[str(e)] = counts.get(str(e), 0) + 1
        continue
      counts["right" if verdict.correct else "wrong"] += 1
      yield from modes
      yield from datasets.replayed_rows(rng, settings.in_world)
    left -= len(batch["thoughts"])
