"""Trajectories of a run: the base model's first rounds, judged and improved, as rows of IRGL.

`settings` is a `run.Settings` throughout.
"""

import itertools
import json
import pathlib

import numpy as np

from irg_jax import storage
from irg_jax.data import parquet
from irg_jax.generate import generator, irg
from irg_jax.mini import datasets, phases, thoughts, verifier
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
      prompts, seeds = [r["prompt"] for r in batch], range(start, start + size)
      plans = phases.plans(loaded, prompts, seeds, settings.first, thoughts.SYSTEM_PROMPT,
                           size=size)
      given = altered(settings, loaded.tokenizer, batch, plans, start)
      drawn = loaded.batch(prompts, seeds, settings.first, thoughts.SYSTEM_PROMPT, size=size,
                           done=[[irg.Round(plan, None, None, {}) for plan in given]])
      with storage.atomic_file(path) as aside, aside.open("wb") as file:
        np.savez(file, records=json.dumps(batch), thoughts=[plan.text for plan in plans],
                 pictures=np.stack([trajectory.rounds[0].image for trajectory in drawn]))
      progress("drawing first images", 0, start + size, len(records))


def altered(settings, tokenizer, batch, plans, start: int) -> list[irg.Thought]:
  """The plans that first images are drawn after: a share `altered_plans` is changed."""
  rng, given = datasets.generator(settings.seed, "altered", start), []
  for record, plan in zip(batch, plans):
    text = rng.random() < settings.altered_plans and datasets.altered_plan(record, plan.text, rng)
    given.append(irg.Thought(text, tuple(tokenizer.encode(text))) if text else plan)
  return given


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
  rng = datasets.generator(settings.seed, "better")
  rows = itertools.chain.from_iterable(
      zip(json.loads(str(batch["records"])), batch["thoughts"], batch["pictures"])
      for batch in map(np.load, sorted(folder.glob("*.npz"))))
  for record, plan, image in itertools.islice(rows, settings.trajectories):
    try:
      verdict = verifier.score(image, record)
      better = thoughts.improve(record, verdict, rng, str(plan))
      modes = list(datasets.trajectory_rows(record, str(plan), image, verdict, better, rng))
    except thoughts.Inexpressible as e:
      counts[str(e)] = counts.get(str(e), 0) + 1
      continue
    counts["right" if verdict.correct else "wrong"] += 1
    yield from modes
    yield from datasets.replayed_rows(rng, settings.in_world)
