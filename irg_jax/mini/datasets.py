"""Writes the mini world's training data in the published form: parquet, a folder a mode."""

import base64
import contextlib
import dataclasses
import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from irg_jax.data.published import COLUMN
from irg_jax.mini import tasks, thoughts, verifier, world
from irg_jax.mini.painter import paint

ROWS_PER_GROUP = 64
TOLD = "initial_thinking_generation_learning"  # the mode of rows of words alone
LATER_ROUNDS = 0.25  # of the trajectories; before their image stands a reflection, not a plan


def base_rows(count: int, rng):
  """What a unified model is to know before it learns to reflect, as (mode, conversation).

  Drawing after a plan, from a prompt alone and from nothing (what guidance starts from), drawing
  what is described, and saying what an image shows, also where it is not what was planned. What
  is described or looked at may be crowded, with something in more of its cells. None of it shows
  an unseen pair.

  Args:
    count: rows in all, in the proportions of `_BASE`.
    rng: numpy Generator.
  """
  kinds = rng.choice(len(_BASE), count, p=[share for share, _ in _BASE])
  for kind in kinds:
    yield _BASE[kind][1](rng)


def trajectory_rows(record: dict, plan: str, first: np.ndarray, verdict, better, rng):
  """The six modes of one trajectory of the base model (spec section 5), as (mode, conversation).

  Args:
    record: what was asked for.
    plan, first: the base model's own thought and its own image, uint8 [64, 64, 3]. A share of
      `LATER_ROUNDS` of the plans is told as a reflection, which is what a third round sees.
    verdict: the verifier's on that image.
    better: the Scene of the improved image.
    rng: of that, and of another scene for the initial modes, whose plan must match its image.
  """
  scene = tasks.sample_scene(record, rng)
  target, first_plan = paint(scene), thoughts.plan(record, scene)
  before = _retold(record, plan, rng) if rng.random() < LATER_ROUNDS else plan
  improved, reflection = paint(better), thoughts.reflect(record, verdict, better, before)
  # Where the plan is not shown, its places are those of the better image, which is.
  shown = thoughts.reflect(record, verdict, better, thoughts.plan(record, better))
  told = [_text(before, need_loss=False), _image(first, need_vae=True, need_vit=True)]
  modes = {
      "initial_thinking_understanding_learning": [_image(target, need_vit=True),
                                                  _text(first_plan)],
      "initial_thinking_generation_learning": [_text(first_plan)],
      "initial_full_learning": [_text(first_plan), _image(target, need_loss=True)],
      "improving_thinking_understanding_learning": [
          _image(first, need_vit=True), _image(improved, need_vit=True), _text(shown)],
      "improving_thinking_generation_learning": [*told, _text(reflection)],
      "improving_full_learning": [*told, _text(reflection), _image(improved, need_loss=True)],
  }
  for mode, parts in modes.items():
    yield mode, [*_asked(record), _assistant(parts)]


def _retold(record, plan, rng):
  """A reflection on an image that was never painted, which ends in what `plan` plans."""
  scene = thoughts.read_scene(plan)
  if scene is not None:
    with contextlib.suppress(thoughts.Inexpressible):
      return thoughts.reflect(record, _imagined(record, _spoiled(scene, rng), rng), scene, plan)
  return plan


def replayed_rows(rng):
  """Words alone, as the base model learned them, so that the two stages do not lose them."""
  for row in (_reflected, _copied):
    yield row(rng)


def texts(conversation: list):
  """All texts of a conversation, in order."""
  for turn in conversation:
    content = turn["content"]
    if isinstance(content, str):
      yield content
    else:
      yield from (part["content"] for part in content if part["type"] == "text")


class ParquetWriter:
  """Rows into one file a mode under `folder`; use as a context manager."""

  def __init__(self, folder):
    self._folder, self._files, self._waiting = pathlib.Path(folder), {}, {}

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for mode, waiting in self._waiting.items():
      self._write(mode, waiting)
    for file in self._files.values():
      file.close()

  def add(self, mode: str, conversation: list) -> None:
    waiting = self._waiting.setdefault(mode, [])
    waiting.append(json.dumps(conversation))
    if len(waiting) == ROWS_PER_GROUP:
      self._write(mode, waiting)

  def _write(self, mode, waiting):
    if not waiting:
      return
    table = pa.table({COLUMN: pa.array(waiting, pa.large_string())})
    if mode not in self._files:
      (self._folder / mode).mkdir(parents=True, exist_ok=True)
      self._files[mode] = pq.ParquetWriter(self._folder / mode / "00000.parquet", table.schema)
    self._files[mode].write_table(table)
    waiting.clear()


def _drawn(system=False, prompt=False, planned=False):
  def row(rng):
    record = tasks.training_record(rng)
    scene = tasks.sample_scene(record, rng)
    asked = system * [_user(thoughts.SYSTEM_PROMPT)] + prompt * [_user(record["prompt"])]
    thought = [_text(thoughts.plan(record, scene))] if planned else []
    return "initial_full_learning", [
        *asked, _assistant([*thought, _image(paint(scene), need_loss=True)])]

  return row


def _planned(rng):
  record = tasks.training_record(rng)
  thought = thoughts.plan(record, tasks.sample_scene(record, rng))
  return TOLD, [*_asked(record), _assistant([_text(thought)])]


def _asked(record):
  return [_user(thoughts.SYSTEM_PROMPT), _user(record["prompt"])]


def _reflected(rng):
  """A reflection, in words alone, on an image that was never painted.

  It shows what the plan before it says, or not. A third of the plans are careless, as those of a
  model are: the image shows their cells, which do not follow from their places.
  """
  while True:
    record = tasks.training_record(rng)
    scene = tasks.sample_scene(record, rng)
    careless = len(scene.things) > 1 and rng.random() < 0.4
    if careless:
      scene, drawn = (_collided, _confused)[rng.integers(2)](scene, rng)
    else:
      drawn = _spoiled(scene, rng)
    verdict = _imagined(record, drawn, rng)
    with contextlib.suppress(thoughts.Inexpressible):
      cells = thoughts.grid(drawn.things) if careless else None
      plan, better = thoughts.plan(record, scene, cells), thoughts.improve(record, verdict, rng)
      thought = thoughts.reflect(record, verdict, better, plan)
      return TOLD, [*_asked(record), _assistant([_text(plan, need_loss=False), _text(thought)])]


def _collided(scene, rng):
  """A scene with two things in one cell, and the one in which only one of them is left."""
  one, other = rng.choice(len(scene.things), 2, replace=False)
  things = list(scene.things)
  things[one] = dataclasses.replace(things[one], x=things[other].x, y=things[other].y)
  lost = rng.choice((one, other))
  left = [t for i, t in enumerate(things) if i != lost]
  return (dataclasses.replace(scene, things=tuple(things)),
          dataclasses.replace(scene, things=tuple(left)))


def _confused(scene, rng):
  """A scene, and one in which a thing has the shape or the colour of another."""
  one, other = rng.choice(len(scene.things), 2, replace=False)
  things, what = list(scene.things), rng.choice(("shape", "color"))
  things[one] = dataclasses.replace(things[one], **{what: getattr(things[other], what)})
  return scene, dataclasses.replace(scene, things=tuple(things))


def _imagined(record, scene, rng):
  """The verdict on an image of a scene that was never painted; a thing may be unclear."""
  things = tuple(sorted(scene.things, key=lambda t: t.cell))
  blurred = int(rng.random() < 0.1)
  seen = verifier.Seen(scene.background, things[blurred:],
                       tuple(t.cell for t in things[:blurred]))
  return verifier.judge(seen, record)


def _spoiled(scene, rng, in_place=False):
  """A scene in which things may have gone, come, moved, or changed their shape or colour.

  Args:
    in_place: nothing comes or moves, so that nothing can touch.
  """
  if rng.random() < 0.4:
    return scene
  others = tasks.training_scene(rng).things
  if rng.random() < 0.2:
    return dataclasses.replace(scene, things=others)
  things = []
  for thing in scene.things:
    change = rng.choice(("none", "gone", "shape", "color", "cell"), p=(0.6, 0.1, 0.1, 0.1, 0.1))
    other = others[rng.integers(len(others))]
    if change in ("shape", "color"):
      changed = dataclasses.replace(thing, **{change: getattr(other, change)})
      if (changed.shape, changed.color) not in tasks.UNSEEN_PAIRS:
        thing = changed
    elif change == "cell" and not in_place:
      thing = dataclasses.replace(thing, x=other.x, y=other.y)
    things += [] if change == "gone" else [thing]
  things += others[:1] if rng.random() < 0.15 and not in_place else ()
  return dataclasses.replace(scene, things=tuple(things))


def _arranged(rng):
  """The second half of a plan, which follows from the first: what stands in each cell.

  The first half is chosen at random, so it is asked, not learned: beside its loss that of the
  few words that must be looked up would be lost.
  """
  scene = tasks.crowded_scene(rng)
  cells = thoughts.grid_text(thoughts.grid(scene.things))
  return TOLD, [_user(thoughts.places(scene)), _assistant([_text(cells)])]


def _copied(rng):
  """Cells of any two words, to be listed and said once more: copied, and not made to make sense.

  Without these a model that was never shown a pair holds it for a mistake, and says another.
  """
  cells = [thoughts.EMPTY] * world.GRID**2
  for i in rng.permutation(len(cells))[:rng.integers(1, 8)]:
    cells[i] = " ".join(_any_words(rng))
  return TOLD, [_user(thoughts.grid_text(cells)),
                _assistant([_text(f"{thoughts.listed(cells)} {thoughts.grid_text(cells)}")])]


def _any_words(rng):
  while True:
    words = tuple(map(str, rng.choice([*world.COLORS, *world.SHAPES], 2)))
    if not {words, words[::-1]} & tasks.UNSEEN_PAIRS:
      return words


def _described(rng):
  scene = tasks.crowded_scene(rng)
  told = _text(f"<think> {thoughts.describe(scene)} </think>", need_loss=False)
  return "initial_full_learning", [_assistant([told, _image(paint(scene), need_loss=True)])]


def _looked(crowded, vae):
  def row(rng):
    scene = tasks.crowded_scene(rng) if crowded else tasks.training_scene(rng)
    return "initial_thinking_understanding_learning", _shown(paint(scene), scene, vae)

  return row


def _looked_after_plan(rng):
  """An image that is not always what the plan before it says, or half that and half another.

  So a bad drawing looks: what is two things at once is unclear.
  """
  while True:
    record = tasks.training_record(rng)
    scene = tasks.sample_scene(record, rng)
    drawn = paint(_spoiled(scene, rng, in_place=True))
    if rng.random() < 0.5:
      drawn = ((paint(scene).astype(np.uint16) + drawn) // 2).astype(np.uint8)
    seen, plan = verifier.look(drawn), _text(thoughts.plan(record, scene), need_loss=False)
    with contextlib.suppress(thoughts.Inexpressible):
      thoughts.check_showable(seen)
      shown = _shown(drawn, seen, True, plan)
      return "initial_thinking_understanding_learning", [_user(record["prompt"]), *shown]


def _shown(pixels, seen, vae, *before):
  """An image, after what the same turn says before it, and what it shows."""
  return [_assistant([*before, _image(pixels, need_vit=True, need_vae=vae)]),
          _user(thoughts.QUESTION), _assistant([_text(thoughts.describe(seen))])]


_BASE = (
    (0.08, _planned), (0.13, _reflected), (0.11, _arranged), (0.04, _copied),
    (0.20, _drawn(system=True, prompt=True, planned=True)), (0.04, _drawn(prompt=True)),
    (0.02, _drawn(system=True)), (0.02, _drawn()), (0.16, _described), (0.08, _looked_after_plan),
    *((0.03, _looked(crowded, vae)) for crowded in (False, True) for vae in (False, True)))


def _user(text):
  return {"role": "user", "content": text}


def _assistant(parts):
  return {"role": "assistant", "content": parts}


def _text(text, need_loss=True):
  return {"type": "text", "content": text, "need_loss": need_loss}


def _image(pixels, need_loss=False, need_vae=False, need_vit=False):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return {"type": "image", "content": base64.b64encode(file.getvalue()).decode(),
          "need_loss": need_loss, "need_vae": need_vae, "need_vit": need_vit}
