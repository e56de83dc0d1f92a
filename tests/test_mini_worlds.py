"""The first world is what it was before there were several."""

import base64
import hashlib
import json

import numpy as np

from irg_jax import images
from irg_jax.mini import benchmark, datasets, scenes, thoughts, verifier, world

# Made with the code of version 0.1, in which this world was the only one.
BEFORE = {
    "records": "d055e2a4b27e98c6", "test": "fa8b93b876bdd6e9", "unseen": "04e05129678527c0",
    "scenes": "6aefbf0f8b123ed1", "images": "7ca6296a21992599", "seen": "f84f84050dc384f4",
    "verdicts": "0ef220125cb05b36", "texts": "6be7f996ca097ae2", "rows": "6b5cb22e8f500dce",
    "rules": "9fc898b27fa187af", "items": "ada5cc473f7b0590", "state": "76b46e38ef7d0129"}


def digest(values):
  return hashlib.sha256("\n".join(values).encode()).hexdigest()[:16]


def pixels(value):
  """A row with pixels in place of encoded images: those depend on the encoder."""
  if isinstance(value, dict):
    return {key: pixels(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [pixels(v) for v in value]
  if isinstance(value, str) and value.startswith(("data:", "iVBOR")):
    value = base64.b64decode(value.split(",")[-1])
  if isinstance(value, bytes):
    return hashlib.sha256(images.decode_image(value, "").tobytes()).hexdigest()
  return value


def named(seen, places=None):
  """The content of an image in plain values, its numbers with so many decimal places."""
  at = (lambda v: v) if places is None else (lambda v: round(v, places))
  return [(t.shape, t.color, at(t.x), at(t.y), at(t.radius)) for t in seen.things]


def told(record, verdict, rng):
  """The plan and reflection of a better image, or why there is none."""
  try:
    better = thoughts.improve(record, verdict, rng)
    plan = thoughts.plan(record, better)
    return [plan, thoughts.reflect(record, verdict, better, plan)]
  except thoughts.Inexpressible as e:
    return [str(e)]


def test_the_first_world_is_what_it_was_before_there_were_several():
  rng, names = np.random.default_rng(0), [*world.WORLD1.tasks]
  records = [world.sample_record(task, rng) for task in names * 30]
  trained = [world.training_record(rng) for _ in range(200)]
  drawn = [scenes.sample_scene(record, rng) for record in records[:100] + trained[:100]]
  crowded = [scenes.crowded_scene(rng) for _ in range(60)]
  painted = [scenes.paint(scene) for scene in drawn + crowded]
  noisy = [np.clip(image + rng.integers(-40, 41, image.shape), 0, 255).astype(np.uint8)
           for image in painted[:100]]
  seen = [verifier.look(image) for image in painted + noisy]
  verdicts = [verifier.judge(s, record) for s, record in zip(seen, trained + records)]
  texts = [text for pair in zip(trained + records, verdicts) for text in told(*pair, rng)]
  rows = [*datasets.base_rows(200, rng)]
  for record, scene, image in zip(records[:12], drawn, painted):
    if not world.is_unseen(record):
      verdict = verifier.score(image, record)
      better = thoughts.improve(record, verdict, rng)
      rows += datasets.trajectory_rows(record, thoughts.plan(record, scene), image, verdict,
                                       better, rng)
  rows += datasets.replayed_rows(rng)
  tests = [world.test_records(task, 12, unseen) for task in names for unseen in (False, True)]
  assert BEFORE == {
      "records": digest(map(json.dumps, records + trained)),
      "test": digest(map(json.dumps, tests)),
      "unseen": digest(str(world.is_unseen(record)) for record in records),
      "scenes": digest(repr((s.background, s.tone, named(s))) for s in drawn + crowded),
      "images": digest(image.tobytes().hex() for image in painted),
      "seen": digest(repr((s.background, named(s, 4), s.unclear)) for s in seen),
      "verdicts": digest(repr((v.correct, v.faults)) for v in verdicts),
      "texts": digest(texts), "rows": digest(json.dumps(pixels(row)) for row in rows),
      "rules": digest(world.prompt_rules()),
      "items": digest(json.dumps(item.extra) for item in benchmark.MINI.read()),
      "state": digest([repr(rng.integers(2**40))])}
