"""Training rows of the mini world, (mode, conversation) in IRGL's published form."""

import contextlib
import dataclasses
import functools
import itertools

import numpy as np

from irg_jax.data.records import MODES, assistant, image_part, text_part
from irg_jax.images import encode_image
from irg_jax.mini import mistakes, thoughts, verifier
from irg_jax.mini.scenes import crowded_scene, paint, sample_scene, training_scene
from irg_jax.mini.world import CELL, GRID, WORLD1, WORLDS, Scene, World, of, training_record

LOOK, TELL, DRAW = MODES[:3]  # of the base model; TELL is text alone
# Of random numbers in a run.
PURPOSES = ("words", "base", "trajectories", "better", "altered", "vit")
# Share of careless plans before a reflection in text alone, without and with `World.aided`.
_CARELESS = 0.4, 0.25
# Share of the second images after a reflection that overlooks faults: they show the final prompt.
OVERLOOKED = 0.3
LATER_ROUNDS = 0.25  # share of the trajectories with a reflection, not a plan, before their image


def generator(seed: int, purpose: str, *more: int) -> np.random.Generator:
  """A generator for one of `PURPOSES` and numbers, independent of all others."""
  return np.random.default_rng([seed, PURPOSES.index(purpose), *more])


def base_rows(count: int, rng, world: World = WORLD1):
  """`count` rows that teach the base model all but improving; none has an unseen pair.

  It learns to plan, to draw after a plan, from a prompt alone and from nothing (for guidance), to
  draw a description, and to describe an image, also a crowded one or one unlike its plan.
  """
  *shares, kinds = zip(*_BASE, strict=True)
  for kind in rng.choice(len(kinds), count, p=shares[list(WORLDS).index(world.name)]):
    yield kinds[kind](rng, world)


def trajectory_rows(record: dict, plan: str, first: np.ndarray, verdict, better, rng):
  """The rows of one trajectory of the base model, in the six modes (docs/spec.md, section 5).

  Args:
    plan, first: the base model's thought and image, uint8 [64, 64, 3]. A share `LATER_ROUNDS` of
      the plans is rewritten as a reflection, which is what a third round sees.
    verdict, better: the verifier's on `first`, and the improved Scene.
    rng: also samples the scene of the initial modes, since their plan must match their image.

  Of an aided world, a share `OVERLOOKED` of the second images follows a thought without a fault.

  Inexpressible where `plan` cannot be read, or where `better` does not keep what was right; the
  latter only in a world with details.
  """
  if len(of(record).details) > 1 and not thoughts.keeps(record, verdict, better):
    raise thoughts.Inexpressible("a better image without all that was right")
  scene = sample_scene(record, rng)
  target, first_plan = paint(scene), thoughts.plan(record, scene)
  before = _retold(record, plan, rng) if rng.random() < LATER_ROUNDS else plan
  improved = repaired(first, verdict.seen, better) if of(record).inside else paint(better)
  reflection = thoughts.reflect(record, verdict, better, before)
  # Without a plan before it, the reflection takes its places from the better image.
  shown = thoughts.reflect(record, verdict, better, thoughts.plan(record, better))
  said = text_part(reflection)
  if of(record).aided and rng.random() < OVERLOOKED:
    sure = verifier.judge_scene(better, record)
    said = text_part(thoughts.reflect(record, sure, better, before), need_loss=False)
  told = [text_part(before, need_loss=False), _image(first, need_vae=True, need_vit=True)]
  parts = ([_image(target, need_vit=True), text_part(first_plan)],
           [text_part(first_plan)],
           [text_part(first_plan), _image(target, need_loss=True)],
           [_image(first, need_vit=True), _image(improved, need_vit=True), text_part(shown)],
           [*told, text_part(reflection)],
           [*told, said, _image(improved, need_loss=True)])
  for mode, content in zip(MODES, parts, strict=True):
    yield mode, [*_asked(record), assistant(content)]


def repaired(first, seen, better) -> np.ndarray:
  """`first` with those cells painted anew whose content differs; all others keep their pixels.

  A model that shall keep what is right must see it kept: a scene painted anew is always a bit off.
  """
  image, painted = first.copy(), paint(dataclasses.replace(better, tone=seen.tone))
  for i, (old, new) in enumerate(zip(thoughts.grid(seen), thoughts.grid(better), strict=True)):
    if old != new:
      cell = tuple(slice(CELL * k, CELL * (k + 1)) for k in divmod(i, GRID))
      image[cell] = painted[cell]
  return image


def altered_plan(record: dict, plan: str, rng) -> str | None:
  """A plan with up to three other things in its cells; None if it plans nothing that can be read.

  An image that is drawn after it is wrong although `plan` may be right, as a bad drawing would be.
  """
  scene = thoughts.read_scene(plan, of(record))
  if scene is None or not scene.things:
    return None
  cells = thoughts.grid(mistakes.altered(scene, rng, include=record["include"]))
  return plan.replace(thoughts.grid_text(thoughts.read_grid(plan)), thoughts.grid_text(cells))


def replayed_rows(rng, world: World = WORLD1) -> list:
  """Text rows of the base model, repeated in both stages so that it does not forget them."""
  return [_reflected(rng, world), _copied(rng, world)]


def texts(conversation: list):
  """All texts of a conversation, in order."""
  for turn in conversation:
    if isinstance(turn["content"], str):
      yield turn["content"]
    else:
      yield from (part["content"] for part in turn["content"] if part["type"] == "text")


def _drawn(rng, world, system=False, prompt=False, planned=False, drawn=True):
  record = training_record(rng, world)
  scene = sample_scene(record, rng)
  asked = system * [_user(thoughts.SYSTEM_PROMPT)] + prompt * [_user(record["prompt"])]
  said = [text_part(thoughts.plan(record, scene))] if planned else []
  said += [_image(paint(scene), need_loss=True)] if drawn else []
  return DRAW if drawn else TELL, [*asked, assistant(said)]


def _reflected(rng, world):
  """A reflection, in text alone, on an imagined image that shows its plan or not.

  In an aided world the image is there in words: else what is "seen" can only be guessed from the
  plan, and a model that learns to guess does not look.
  """
  record, plan, seen, thought = _imagined_reflection(rng, world)
  told = [thoughts.observe(seen)] if world.aided else []
  said = [*(text_part(text, need_loss=False) for text in (plan, *told)), text_part(thought)]
  return TELL, [*_asked(record), assistant(said)]


def _compared(rng, world):
  """The filled cells of a plan, those of an image, and which of the latter a reflection names.

  Up to all of them differ, mostly in a word: a model learns to compare late, and only where much of
  the loss is comparing.
  """
  scene = crowded_scene(rng, world)
  wanted = thoughts.grid(scene)
  seen = thoughts.grid(mistakes.altered(scene, rng, len(scene.things)))
  filled = [i for i, cell in enumerate(wanted) if not cell.endswith(thoughts.EMPTY)]
  text = lambda cells, letters: thoughts.grid_text(
      [cells[i] for i in filled], [letters[i] for i in filled])
  given = f"{text(wanted, thoughts.LETTERS)} {text(seen, thoughts.SEEN_LETTERS)}"
  said = thoughts.unlike(seen, wanted)
  return TELL, [_user(given), assistant([text_part(said)])]


def _imagined_reflection(rng, world):
  """A record, a plan, the `verifier.Seen` of an image, and the reflection on it.

  Some plans are careless, as a model's can be: the image shows the cells, which do not follow from
  the places.
  """
  while True:
    record = training_record(rng, world)
    scene = sample_scene(record, rng)
    careless = len(scene.things) > 1 and rng.random() < _CARELESS[world.aided]
    if careless:
      scene, drawn = mistakes.careless(scene, rng)
    else:
      drawn = mistakes.drawn_badly(scene, rng, record["include"])
    verdict = _imagined(record, drawn, rng)
    with contextlib.suppress(thoughts.Inexpressible):
      plan = thoughts.plan(record, scene, thoughts.grid(drawn) if careless else None)
      better = thoughts.improve(record, verdict, rng, plan)
      return record, plan, verdict.seen, thoughts.reflect(record, verdict, better, plan)


def _arranged(rng, world):
  """The second half of a plan, which follows from the first: the content of each cell.

  The first half is random, so it is given, not learned: its loss would hide that of the few
  words that must be looked up.
  """
  scene = crowded_scene(rng, world)
  cells = thoughts.grid_text(thoughts.grid(scene))
  return TELL, [_user(thoughts.places(scene)), assistant([text_part(cells)])]


def _understood(rng, world):
  """A prompt as typed, and what it asks for in the fixed wording of plans."""
  record = training_record(rng, world)
  said = text_part(f"{thoughts.request(record)}.")
  return TELL, [_user(record["prompt"]), _user(thoughts.REQUEST), assistant([said])]


def _placed(rng, world):
  """The places of a plan, which follow from what is asked for."""
  record = training_record(rng, world)
  said = text_part(thoughts.places(sample_scene(record, rng), record))
  return TELL, [_user(f"{thoughts.request(record)}."), assistant([said])]


def _copied(rng, world):
  """Cells of any two words, to be listed and repeated: copied, without any meaning.

  Without these rows a model takes a pair it was never shown for a mistake, and writes another.
  """
  cells = thoughts.grid(Scene("", (), world=world))
  names = [*filter(None, world.details), *world.colors, *world.shapes]
  for i in rng.permutation(len(cells))[:rng.integers(1, 8)]:
    count = len(cells[i].split())
    while {*itertools.permutations(said := [*map(str, rng.choice(names, count))], 2)} & (
        world.unseen_pairs):
      pass
    cells[i] = " ".join(said)
  said = text_part(f"{thoughts.listed(cells)} {thoughts.grid_text(cells)}")
  return TELL, [_user(thoughts.grid_text(cells)), assistant([said])]


def _described(rng, world):
  scene = crowded_scene(rng, world)
  return DRAW, [assistant([_told(thoughts.describe(scene)),
                           _image(paint(scene), need_loss=True)])]


def _edited(rng, world):
  """An image, then an edited one; the text between says all that it shows, or only what changes.

  Most rows say only what changes, so that the rest must be copied. A model that is always told all
  draws it anew. The average of both images looks like a bad drawing of the second.
  """
  scene = crowded_scene(rng, world) if rng.random() < 0.5 else training_scene(rng, world)
  wrong = scene if rng.random() < 0.2 else mistakes.altered(scene, rng)
  before, after = paint(wrong), paint(scene)
  if rng.random() < 0.5:
    before = _average(before, after)
  steps = ", ".join(thoughts.edits(thoughts.grid(wrong), thoughts.grid(scene)))
  told = thoughts.describe(scene) if rng.random() < 0.4 else f"Steps: {steps}."
  return DRAW, [assistant([_image(before, need_vae=True, need_vit=True), _told(told),
                           _image(after, need_loss=True)])]


def _told(text):
  return text_part(f"<think> {text} </think>", need_loss=False)


def _average(one, other):
  return ((one.astype(np.uint16) + other) // 2).astype(np.uint8)


def _looked(rng, world, crowded, vae):
  scene = crowded_scene(rng, world) if crowded else training_scene(rng, world)
  return LOOK, _shown(paint(scene), scene, vae)


def _looked_after_plan(rng, world):
  """An image that may differ from the plan before it, or be an average of two scenes.

  The average looks like a bad drawing: a cell that shows two things at once is unclear.
  """
  while True:
    record = training_record(rng, world)
    scene = sample_scene(record, rng)
    drawn = paint(mistakes.spoiled(scene, rng, in_place=True))
    if rng.random() < 0.5:
      drawn = _average(paint(scene), drawn)
    seen = verifier.look(drawn, world)
    plan = text_part(thoughts.plan(record, scene), need_loss=False)
    with contextlib.suppress(thoughts.Inexpressible):
      thoughts.check_showable(seen)
      return LOOK, [_user(record["prompt"]), *_shown(drawn, seen, True, plan)]


# (share in world 1, share in world 2, kind of row: Generator, World -> (mode, conversation))
_planned = functools.partial(_drawn, system=True, prompt=True, planned=True)
_BASE = (
    (0.08, 0.13, functools.partial(_planned, drawn=False)), (0.0, 0.07, _understood),
    (0.0, 0.06, _placed), (0.13, 0.08, _reflected), (0.0, 0.10, _compared),
    (0.11, 0.05, _arranged), (0.04, 0.03, _copied),
    (0.20, 0.12, _planned), (0.04, 0.02, functools.partial(_drawn, prompt=True)),
    (0.02, 0.005, functools.partial(_drawn, system=True)), (0.02, 0.005, _drawn),
    (0.16, 0.02, _described), (0.08, 0.10, _looked_after_plan), (0.0, 0.15, _edited),
    *((0.03, share, functools.partial(_looked, crowded=crowded, vae=vae))
      for crowded, share in ((False, 0.01), (True, 0.02)) for vae in (False, True)))


def _retold(record, plan, rng):
  """A reflection on an imagined image, which ends in the scene that `plan` plans."""
  scene = thoughts.read_scene(plan, of(record))
  if scene is not None:
    with contextlib.suppress(thoughts.Inexpressible):
      verdict = _imagined(record, mistakes.drawn_badly(scene, rng, record["include"]), rng)
      return thoughts.reflect(record, verdict, scene, plan)
  return plan


def _imagined(record, scene, rng):
  """The verdict on an image of a scene that is not painted; one thing may be unclear."""
  things = tuple(sorted(scene.things, key=lambda t: t.cell))
  blurred = int(rng.random() < 0.1)
  unclear = tuple(t.cell for t in things[:blurred])
  return verifier.judge(verifier.Seen(scene.background, things[blurred:], unclear, scene.world),
                        record)


def _asked(record):
  return [_user(thoughts.SYSTEM_PROMPT), _user(record["prompt"])]


def _shown(pixels, seen, vae, *before):
  """An image, after the parts before it in the same turn, and its description."""
  return [assistant([*before, _image(pixels, need_vit=True, need_vae=vae)]),
          _user(thoughts.QUESTION), assistant([text_part(thoughts.observe(seen))])]


def _user(text):
  return {"role": "user", "content": text}


def _image(pixels, **flags):
  return image_part(encode_image(pixels), **flags)
