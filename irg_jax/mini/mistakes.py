"""Mistakes: scenes that a bad drawing or a careless plan shows."""

import dataclasses

from irg_jax.mini.scenes import crowded_scene, training_scene
from irg_jax.mini.verifier import meant

_SAME = 0.4  # share of images without a mistake, ...
_SAME_AIDED = 0.15  # ... and of those that an aided model shall look at: most are unlike their plan
_GONE = 0.25  # share of the altered things that are gone


def drawn_badly(scene, rng, include=()):
  """A scene as a bad drawing may show it; in an aided world it is the same or `altered`."""
  if not scene.world.aided:
    return spoiled(scene, rng)
  if not scene.things or rng.random() < _SAME:
    return scene
  return altered(scene, rng, len(scene.things), include)


def altered(scene, rng, most=3, include=()):
  """A scene in which one to `most` things are gone, or have another shape, colour or detail.

  None is then what a clause of `include` asks for.
  """
  things, others = list(scene.things), crowded_scene(rng, scene.world).things
  for i in rng.permutation(len(things))[:rng.integers(1, most + 1)]:
    changed = [_like(things[i], other, name) for other in others for name in _words(scene.world)]
    changed = [t for t in changed if t.kind != things[i].kind
               and not t.pairs & scene.world.unseen_pairs
               and not any(meant(t, clause) for clause in include)]
    gone = not changed or rng.random() < _GONE
    things[i] = None if gone else changed[rng.integers(len(changed))]
  return with_things(scene, filter(None, things))


def spoiled(scene, rng, in_place=False):
  """A scene in which things may be removed, added, moved, or have another shape, colour or detail.

  Some stay as they are. With `in_place`, for images that are painted, nothing is added or moved, so
  that nothing can touch.
  """
  if rng.random() < (_SAME_AIDED if in_place and scene.world.aided else _SAME):
    return scene
  others = training_scene(rng, scene.world).things
  if rng.random() < 0.2:
    return with_things(scene, others)
  things, words = [], _words(scene.world)
  changes = ("none", "gone", *words, "cell")
  shares = (0.8 - 0.1 * len(words), *[0.1] * (len(changes) - 1))
  for thing in scene.things:
    change = rng.choice(changes, p=shares)
    other = others[rng.integers(len(others))]
    if change in words:
      changed = _like(thing, other, change)
      thing = thing if changed.pairs & scene.world.unseen_pairs else changed
    elif change == "cell" and not in_place:
      thing = _like(thing, other, change)
    things += [] if change == "gone" else [thing]
  things += others[:1] if rng.random() < 0.15 and not in_place else ()
  return with_things(scene, things)


def careless(scene, rng):
  """The scenes of a careless plan's places and of its cells.

  Two things collide in one cell, and one is left; or one has a word of another, unless that makes
  a pair held out of training; or, in an aided world, they change places against a relation.
  """
  things, kind = list(scene.things), rng.integers(2 + scene.world.aided)
  one, other = rng.choice(len(things), 2, replace=False)
  if kind == 2:
    things[one], things[other] = (_like(things[i], things[j], "cell")
                                  for i, j in ((one, other), (other, one)))
    return with_things(scene, things), with_things(scene, things)
  name = "cell" if kind == 0 else rng.choice(_words(scene.world))
  things[one] = _like(things[one], things[other], name)
  if things[one].pairs & scene.world.unseen_pairs:
    return scene, scene
  if kind == 1:
    return scene, with_things(scene, things)
  lost = rng.choice((one, other))
  return with_things(scene, things), with_things(scene, things[:lost] + things[lost + 1:])


def with_things(scene, things):
  return dataclasses.replace(scene, things=tuple(things))


def _words(world):
  """The fields of a thing that words name."""
  return ("shape", "color", "detail")[:2 + (len(world.details) > 1)]


def _like(thing, other, name):
  """A thing with the shape, color, detail or cell of another."""
  names = {"cell": ("x", "y"), "detail": ("detail", "radius")}.get(name, (name,))
  return dataclasses.replace(thing, **{name: getattr(other, name) for name in names})
