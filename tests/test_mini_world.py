"""The mini world: what is painted, what training never shows, and the verifier of images."""

import ast
import dataclasses
import functools
import pathlib

import numpy as np
import pytest
from scipy import ndimage

from irg_jax.mini import fits, scenes, tasks, verifier, world
from irg_jax.mini.world import Thing
from mini_records import SEEN_ONLY


EACH = pytest.mark.parametrize("where", world.WORLDS.values(), ids=world.WORLDS)


@functools.cache
def _many(where):
  rng = np.random.default_rng(0)
  turns = 150 if where is world.WORLD1 else 165
  records = [world.sample_record(task, rng, where) for task in [*where.tasks] * turns]
  drawn = [scenes.sample_scene(record, rng) for record in records]
  return [(r, s, scenes.paint(s)) for r, s in zip(records, drawn)]


def _scenes(count, start=0, where=world.WORLD1):
  """(record, scene, image) of all tasks in turn, seen and unseen alike.

  Half as many of a world whose images show more than twice as many things.
  """
  return _many(where)[start:start + count // (1 + (where is not world.WORLD1))]


def _look(image, scene):
  return verifier.look(_image(image), scene.world)


def _finds(scene, seen):
  """Whether exactly the things of a scene are seen, and its background."""
  kinds = [sorted((t.cell, t.kind) for t in s.things) for s in (scene, seen)]
  return kinds[0] == kinds[1] and seen.background == scene.background and not seen.unclear


def _share(values):
  values = list(values)
  assert len(values) >= 100
  return float(np.mean(values))


def _image(array):
  return np.clip(np.round(array), 0, 255).astype(np.uint8)


def _blur(image, sigma):
  return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))


def _bare(scene):
  return scenes.paint(dataclasses.replace(scene, things=()))


# --- the painter and the scenes ---


@EACH
def test_painting_the_same_scene_twice_gives_the_same_image(where):
  for _, scene, image in _scenes(20, where=where):
    np.testing.assert_array_equal(image, scenes.paint(scene))
    assert image.shape == (world.SIZE, world.SIZE, 3) and image.dtype == np.uint8


@EACH
def test_things_stay_inside_and_apart(where):
  for _, scene, image in _scenes(420, where=where):
    unlike = np.abs(image.astype(int) - _bare(scene)).sum(-1) > 60
    assert ndimage.label(unlike, np.ones((3, 3)))[1] == len(scene.things)
    reach = [(v, t.radius * (1.05 if t.shape == "diamond" else 1))
             for t in scene.things for v in (t.x, t.y)]
    assert all(r <= v <= world.SIZE - r for v, r in reach)


@EACH
def test_things_of_a_scene_are_in_cells_of_their_own(where):
  for record, scene, _ in _scenes(420, where=where):
    assert len({t.cell for t in scene.things}) == sum(c["count"] for c in record["include"])


# --- what is held out ---


@EACH
def test_training_shows_nothing_that_is_held_out(where):
  rng = np.random.default_rng(4)
  for _ in range(2000):
    record = world.training_record(rng, where)
    assert not world.is_unseen(record) and not world.is_for_test(record)
    scene = scenes.sample_scene(record, rng)
    assert not set().union(*(t.pairs for t in scene.things)) & where.unseen_pairs
  for _ in range(100):
    crowd = scenes.crowded_scene(rng, where).things
    assert not set().union(*(t.pairs for t in crowd)) & where.unseen_pairs


@EACH
def test_test_prompts_are_never_trained_on(where):
  rng, bare = np.random.default_rng(5), lambda record: record["prompt"].lower().rstrip(".!")
  trained = {bare(world.training_record(rng, where)) for _ in range(2000)}
  for unseen in (False, True):
    records = [r for task in where.tasks for r in world.test_records(task, 6, unseen, where)]
    assert len({r["prompt"] for r in records}) == len(records) >= 24
    assert not set(map(bare, records)) & trained
    assert all(world.is_unseen(r) == unseen for r in records)
    assert {r["split"] for r in records} == {"unseen" if unseen else "seen"}


@EACH
def test_every_task_has_prompts_for_the_test_which_are_the_same_at_every_call(where):
  always = SEEN_ONLY if where is world.WORLD1 else ()
  for task in where.tasks:
    for unseen in (False, True):
      records = world.test_records(task, 4, unseen, where)
      assert records == world.test_records(task, 4, unseen, where) and len(records) <= 4
      assert bool(records) != (unseen and task in always)
      for record in records:
        assert (record["tag"], world.is_unseen(record)) == (task, unseen)
        assert world.is_for_test(record) and record["split"] == ("unseen" if unseen else "seen")
        assert world.of(record) is where


def test_a_relation_is_held_out_in_both_ways_of_saying_it():
  def record(first, relation, second):
    return {"include": [{"class": second, "count": 1},
                        {"class": first, "count": 1, "position": [relation, 0]}]}
  assert world.is_unseen(record("circle", "left of", "star"))
  assert world.is_unseen(record("star", "right of", "circle"))
  assert not world.is_unseen(record("star", "left of", "circle"))


@pytest.mark.parametrize("arguments, words", [
    ((1, "circle", "red"), "a red circle"), ((1, "star", "orange"), "an orange star"),
    ((1, "cross"), "a cross"), ((2, "cross"), "two crosses"),
    ((3, "ring", "blue"), "three blue rings"), ((1, "ring", "blue", False), "one blue ring")])
def test_nouns(arguments, words):
  assert world.noun(*arguments) == words


def test_prompts_name_every_clause():
  for record, _, _ in _scenes(420):
    for clause in record["include"]:
      words = world.noun(clause["count"], clause["class"], clause.get("color"))
      assert words in record["prompt"]


# --- the verifier reads good images ---


def test_the_verifier_knows_nothing_of_the_painter():
  names = set()
  for module in (verifier, fits):
    for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
      if isinstance(node, ast.ImportFrom):
        names |= {f"{node.module}.{a.name}" for a in node.names}
      elif isinstance(node, ast.Import):
        names |= {a.name for a in node.names}
  own = {n.removeprefix("irg_jax.mini.") for n in names if n.startswith("irg_jax")}
  assert own == {"fits.fit", "fits.square"} | {f"world.{name}" for name in (
      "SIZE", "CELL", "COLORS", "BACKGROUNDS", "WORLD1", "World", "Thing", "lighter", "noun",
      "nouns", "of", "relations")}


@EACH
def test_the_scenes_of_a_record_are_judged_correct(where):
  verdicts = [(verifier.score(image, record), scene)
              for record, scene, image in _scenes(1050, where=where)]
  assert _share(v.correct for v, _ in verdicts) >= 0.995
  assert _share(_finds(scene, v.seen) for v, scene in verdicts) >= 0.995


@pytest.mark.long
@EACH
def test_2000_fresh_training_scenes_and_crowded_ones_are_read_rightly(where):
  rng = np.random.default_rng(19)
  for make in (scenes.training_scene, scenes.crowded_scene):
    drawn = (make(rng, where) for _ in range(2000))
    assert _share(_finds(scene, _look(scenes.paint(scene), scene)) for scene in drawn) >= 0.995


@EACH
def test_places_and_radii_are_read_closely(where):
  for _, scene, image in _scenes(70, where=where):
    things = {t.cell: t for t in _look(image, scene).things}
    for thing in scene.things:
      seen = things[thing.cell]
      assert max(abs(seen.x - thing.x), abs(seen.y - thing.y)) < 0.2
      assert abs(seen.radius - thing.radius) < (0.25 if thing.detail else 0.2)


_HARMLESS = {
    "blur": lambda p, rng: _blur(p, 0.5),
    "noise": lambda p, rng: p + rng.uniform(-6, 6, p.shape),
    "shift": lambda p, rng: p + rng.uniform(-8, 8, 3),
    "ringing": lambda p, rng: p + 0.15 * (p - _blur(p, 1.0)),
    "all": lambda p, rng: (_blur(p, 0.5) + 0.1 * (p - _blur(p, 1.0)) + rng.uniform(-6, 6, p.shape)
                           + rng.uniform(-8, 8, 3)),
}


@EACH
@pytest.mark.parametrize("kind", _HARMLESS)
def test_slight_changes_are_tolerated(kind, where):
  rng = np.random.default_rng(9)
  assert _share(_finds(scene, _look(_HARMLESS[kind](image, rng), scene))
                for _, scene, image in _scenes(210, 420, where)) >= 0.995


# --- the verifier rejects damaged images ---


def _offsets(thing):
  y, x = np.mgrid[:world.SIZE, :world.SIZE] + 0.5
  return x - thing.x, y - thing.y


def _around(thing):
  return np.maximum(*map(abs, _offsets(thing))) < thing.radius + 1


def _without(image, scene, mask):
  return np.where(mask[..., None], _bare(scene), image)


def _cut_a_quarter(image, scene, thing, rng):
  x, y = _offsets(thing)
  turned = (x, y, -x, -y)
  i = int(rng.integers(4))
  return _without(image, scene, _around(thing) & (turned[i] > 0) & (turned[i - 1] > 0))


def _cut_a_half(image, scene, thing, rng):
  if thing.shape == "triangle":  # what is left of one may be a triangle
    return _cut_a_quarter(image, scene, thing, rng)
  x, y = _offsets(thing)
  turn = rng.uniform(0, 2 * np.pi)
  return _without(image, scene, _around(thing) & (x * np.cos(turn) + y * np.sin(turn) > 0))


def _fade(image, scene, thing, rng):
  """Half-transparent."""
  share = 0.5
  seen = share * np.array(world.COLORS[thing.color]) + (1 - share) * _bare(scene)[0, 0]
  near = min(np.linalg.norm(seen - c) for c in map(np.array, world.COLORS.values()))
  if near < 36:  # orange on black, half, is brown to any eye
    return _cut_a_quarter(image, scene, thing, rng)
  return np.where(_around(thing)[..., None],
                  share * image + (1 - share) * _bare(scene), image)


def _grow_together(image, scene, thing, rng):
  """Another thing, more than half of it behind one."""
  x = y = 0.0
  while not thing.radius < min(x, y) <= max(x, y) < world.SIZE - thing.radius:
    turn = rng.uniform(0, 2 * np.pi)
    x = thing.x + 1.2 * thing.radius * np.cos(turn)
    y = thing.y + 1.2 * thing.radius * np.sin(turn)
  behind = Thing(str(rng.choice(scene.world.shapes)), str(rng.choice(list(world.COLORS))),
                 float(x), float(y), thing.radius, thing.detail)
  return scenes.paint(dataclasses.replace(scene, things=(behind,) + scene.things))


def _smear(image, scene, thing, rng):
  sigmas = [(4, 0, 0), (0, 4, 0)][int(rng.integers(2))]
  return np.where(_around(thing)[..., None],
                  ndimage.gaussian_filter(image.astype(float), sigmas), image)


def _drop_a_blob(image, scene, thing, rng):
  free = ndimage.binary_erosion((image == _bare(scene)).all(-1), np.ones((7, 7)))
  row, column = rng.choice(np.argwhere(free))
  y, x = np.mgrid[:world.SIZE, :world.SIZE]
  most = 4 if scene.world is world.WORLD1 else 3  # else it is a small circle
  blob = np.hypot(y - row, x - column) < rng.uniform(2.3, most)
  return np.where(blob[..., None], world.COLORS[str(rng.choice(list(world.COLORS)))], image)


def _two_colors(image, scene, thing, rng):
  color = str(rng.choice([c for c in world.COLORS if c != thing.color]))
  things = tuple(dataclasses.replace(t, color=color) if t is thing else t for t in scene.things)
  other = scenes.paint(dataclasses.replace(scene, things=things))
  return np.where((_offsets(thing)[0] > 0)[..., None], image, other)


def _mix_colors(image, scene, thing, rng):
  """Half-way between two colours; red with yellow is orange, and with green brown."""
  merged = {("red", "yellow"), ("red", "green")}
  other = str(rng.choice([c for c in world.COLORS if c != thing.color
                          and not merged & {(c, thing.color), (thing.color, c)}]))
  things = tuple(dataclasses.replace(t, color=other) if t is thing else t for t in scene.things)
  return (image.astype(float) + scenes.paint(dataclasses.replace(scene, things=things))) / 2


_DAMAGE = {f.__name__.strip("_"): f for f in (
    _cut_a_quarter, _cut_a_half, _fade, _grow_together, _smear, _drop_a_blob, _two_colors,
    _mix_colors)} | {"blur": lambda image, scene, thing, rng: _blur(image, 1.5)}


@EACH
@pytest.mark.parametrize("kind", _DAMAGE)
def test_damage_is_unclear(kind, where):
  rng = np.random.default_rng(11)
  seen = []
  for _, scene, image in _scenes(210, 840, where):
    thing = scene.things[int(rng.integers(len(scene.things)))]
    seen.append(_look(_DAMAGE[kind](image, scene, thing, rng), scene))
  assert _share(bool(s.unclear) for s in seen) >= 0.99


def _another_color(scene, rng):
  things = list(scene.things)
  color = str(rng.choice([c for c in world.COLORS if c != things[-1].color]))
  return (*things[:-1], dataclasses.replace(things[-1], color=color))


def _another_shape(scene, rng):
  things = list(scene.things)
  shape = str(rng.choice([s for s in scene.world.shapes if s != things[-1].shape]))
  return (*things[:-1], dataclasses.replace(things[-1], shape=shape))


def _another_detail(scene, rng):
  *things, last = scene.things
  detail = str(rng.choice([d for d in scene.world.details if d != last.detail]))
  radius = float(np.mean(scene.world.radii[detail]))
  return (*things, dataclasses.replace(last, detail=detail, radius=radius))


def _one_more(scene, rng):
  taken, place = [(t.x, t.y, t.radius) for t in scene.things], None
  like = scene.things[int(rng.integers(len(scene.things)))]
  while place is None:
    cell = tuple(rng.integers(0, world.GRID, 2))
    place = scenes.place_beside(cell, taken, rng, like.detail, scene.world)
  return (*scene.things, Thing(like.shape, like.color, *place, like.detail))


_CHANGES = {"color": _another_color, "shape": _another_shape, "detail": _another_detail,
            "more": _one_more,
            "fewer": lambda scene, rng: scene.things[:-1]}


@EACH
@pytest.mark.parametrize("kind", _CHANGES)
def test_another_scene_is_not_what_was_asked_for(kind, where):
  rng = np.random.default_rng(13)
  wrong, found = [], []
  if kind == "detail" and len(where.details) == 1:
    pytest.skip("this world has no details")
  for record, scene, _ in _scenes(420 if kind in ("color", "detail") else 210, 630, where):
    if kind in ("color", "detail") and kind not in record["include"][-1]:
      continue
    other = dataclasses.replace(scene, things=_CHANGES[kind](scene, rng))
    verdict = verifier.score(scenes.paint(other), record)
    wrong.append(not verdict.correct)
    found.append(_finds(other, verdict.seen))
  assert np.mean(wrong) >= 0.99 and np.mean(found) >= 0.995 and len(wrong) >= 80


@EACH
def test_specks_are_passed_over(where):
  for _, scene, image in _scenes(50, where=where):
    free = ndimage.binary_erosion((image == _bare(scene)).all(-1), np.ones((7, 7)))
    row, column = np.argwhere(free)[0]
    speck = image.copy()
    speck[row:row + 2, column:column + 2] = world.COLORS["purple"]
    assert _finds(scene, _look(speck, scene))


def test_images_of_no_scene():
  white = np.full((world.SIZE, world.SIZE, 3), 245, np.uint8)
  assert verifier.look(white) == verifier.Seen("white", (), ())
  red = np.broadcast_to(np.array(world.COLORS["red"], np.uint8), white.shape)
  assert verifier.look(red) == verifier.Seen(None, (), ())
  noise = np.random.default_rng(16).integers(0, 256, white.shape).astype(np.uint8)
  assert verifier.look(noise).unclear and not verifier.look(noise).things
  with pytest.raises(ValueError, match="uint8"):
    verifier.look(white.astype(np.float32))
  with pytest.raises(ValueError, match=r"\[64, 64, 3\]"):
    verifier.look(white[:32])


@EACH
def test_fidelity_falls_with_blur_and_is_told_of_each_thing(where):
  found = []
  for sigma in (0.0, 0.8, 1.6):
    seen = [_look(_blur(image, sigma), scene) for _, scene, image in _scenes(40, where=where)]
    assert all(len(s.fidelity) == len(s.things) + len(s.unclear) for s in seen)
    found.append(np.mean([pair for s in seen for pair in s.fidelity], 0))
  assert (found[0] > 0.94).all() and (found[0] > found[1] + 0.01).all()
  assert (found[1] > found[2] + 0.1).all() and (found[2] > 0.2).all()


# --- judging ---


def _thing(shape, color, x, y):
  return Thing(shape, color, float(x), float(y), 6.0)


def _faults(things, include, unclear=()):
  verdict = verifier.judge(verifier.Seen("white", tuple(things), tuple(unclear)),
                           {"include": include})
  assert verdict.correct == (not verdict.faults)
  return verdict.faults


_RED = {"class": "circle", "count": 2, "color": "red"}
_STAR = {"class": "star", "count": 1, "color": "blue"}


def test_faults_come_in_words_and_in_order():
  things = [_thing("circle", "red", 56, 8), _thing("star", "blue", 24, 8),
            _thing("star", "green", 8, 40), _thing("star", "green", 24, 40),
            _thing("ring", "orange", 40, 40)]
  include = [_STAR, _RED | {"position": ["left of", 0]}]
  assert _faults(things, include, [(3, 3)]) == (
      "one shape is unclear", "one red circle is missing", "two green stars are too many",
      "one orange ring is too many", "the red circles are not left of the blue star")


def test_the_share_of_things_right_is_of_those_asked_for_or_of_those_there():
  share = lambda things, unclear=(): verifier.judge(
      verifier.Seen("white", tuple(things), tuple(unclear)), {"include": [_STAR, _RED]}).share
  star = _thing("star", "blue", 8, 8)
  red = [_thing("circle", "red", 24 + 16 * i, 8) for i in (0, 1)]
  assert share([star, *red]) == 1.0 and share([]) == 0.0
  assert share([star, red[0]]) == 2 / 3
  assert share([star, *red, _thing("ring", "red", 8, 40)], [(3, 3)]) == 3 / 5


def test_details_are_judged_and_named_in_faults():
  def thing(detail, color="red"):
    return Thing("circle", color, 8.0, 8.0, 6.5, detail)
  include = [{"class": "circle", "count": 2, "color": "red", "detail": "striped"},
             {"class": "circle", "count": 1, "color": "red"}]
  seen = lambda *things: verifier.judge(
      verifier.Seen("white", things, (), world.WORLD2), {"include": include}).faults
  assert seen(thing("plain"), thing("striped"), thing("striped")) == ()
  assert seen(thing("plain"), thing("striped"), thing("dotted")) == (
      "one striped red circle is missing", "one dotted red circle is too many")
  assert seen(thing("striped"), thing("striped")) == ("one red circle is missing",)


def test_numbers_in_faults():
  assert _faults([], [_RED]) == ("two red circles are missing",)
  assert _faults([], [{"class": "cross", "count": 3}]) == ("three crosses are missing",)
  assert _faults([], [], [(0, 0), (1, 1)]) == ("two shapes are unclear",)
  assert _faults([], [], [(0, 0)] * 7) == ("many shapes are unclear",)
  many = [_thing("star", "red", 8, 8)] * 6
  assert _faults(many, []) == ("many red stars are too many",)


def test_a_wrong_colour_is_one_missing_and_one_too_many():
  include = [{"class": "circle", "count": 1, "color": "red"}]
  assert _faults([_thing("circle", "blue", 8, 8)], include) == (
      "one red circle is missing", "one blue circle is too many")


def test_clauses_with_a_colour_choose_first():
  include = [{"class": "circle", "count": 1}, {"class": "circle", "count": 1, "color": "red"}]
  things = [_thing("circle", "red", 8, 8), _thing("circle", "blue", 40, 8)]
  assert _faults(things, include) == ()
  assert _faults(things[:1], include) == ("one circle is missing",)


@pytest.mark.parametrize("place, relations", [
    ((0, 20), ("below",)), ((0, -20), ("above",)), ((20, 0), ("right of",)),
    ((-20, 0), ("left of",)), ((20, 19), ("right of", "below")), ((20, 8), ("right of",)),
    ((5, 0), ()), ((7, 0), ("right of",)), ((7, -20), ("above",)), ((0, 0), ())])
def test_relations_are_judged_by_the_offset(place, relations):
  things = [_thing("star", "blue", 32, 32), _thing("ring", "red", 32 + place[0], 32 + place[1])]
  for relation in tasks.RELATIONS:
    include = [_STAR, {"class": "ring", "count": 1, "position": [relation, 0]}]
    fault = () if relation in relations else (f"the ring is not {relation} the blue star",)
    assert _faults(things, include) == fault


def test_a_relation_is_judged_on_what_is_there():
  include = [_STAR, _RED | {"position": ["above", 0]}]
  above, below = _thing("circle", "red", 32, 8), _thing("circle", "red", 32, 56)
  star = _thing("star", "blue", 32, 32)
  assert _faults([above, star], include) == ("one red circle is missing",)
  assert _faults([above, star, below], include) == (
      "the red circles are not above the blue star",)
  assert _faults([star], include) == ("two red circles are missing",)
