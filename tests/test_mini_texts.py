"""The mini world's texts, trajectories, tokenizer and autoencoder agree with what is painted."""

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from irg_jax import config as config_lib
from irg_jax.images import to_pixels
from irg_jax.data.records import MODES, ImagePart, TextPart, parse_conversation
from irg_jax.mini import datasets, run, scenes, thoughts, vae, verifier, world
from irg_jax.mini.scenes import paint
from irg_jax.model.vae import Vae, sample_latents
from irg_jax.reports import pages
from irg_jax.tokenizer import load_tokenizer, train_tokenizer

ROOT_CONFIG = "configs/mini.py"


def cases(count, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(count):
    record = world.training_record(rng)
    yield record, scenes.sample_scene(record, rng), rng


def seen(scene):
  return verifier.Seen(scene.background, scene.things, ())


def test_a_plan_says_what_stands_in_each_cell_and_can_be_read_back():
  for record, scene, _ in cases(50):
    cells = thoughts.read_grid(thoughts.plan(record, scene))
    named = {divmod(i, 4): cell for i, cell in enumerate(cells) if cell != thoughts.EMPTY}
    assert named == {t.cell: f"{t.color} {t.shape}" for t in scene.things}


def test_every_cell_takes_three_tokens_wherever_it_stands(tmp_path):
  small = run.load("configs/mini.py")
  size = small.model.llm.vocab_size
  train_tokenizer(tmp_path, run.sample_texts(small, 2000), size)
  words = load_tokenizer(tmp_path, size)
  things = [f"{c} {s}" for c in world.COLORS for s in world.WORLD1.shapes]
  rng = np.random.default_rng(0)
  for _ in range(50):
    cells = rng.choice([*things, thoughts.EMPTY, thoughts.UNCLEAR], 16).tolist()
    assert len(words.encode(" " + thoughts.grid_text(cells))) == 2 + 3 * 16 + 1
    things = [cell for cell in cells if cell != thoughts.EMPTY]
    assert re.findall(r">([^<\s][^<]*)</td>", pages.drawn(thoughts.grid_text(cells))) == things


def test_a_text_without_a_grid_reads_as_none():
  assert thoughts.read_grid("<think> a red circle </think>") is None
  assert thoughts.read_faults("<think> a red circle </think>") is None


def test_a_reflection_names_the_faults_of_the_verdict_and_ends_in_the_better_image():
  for record, scene, rng in cases(50, seed=1):
    wrong = scenes.sample_scene(world.training_record(rng), rng)
    verdict = verifier.judge(seen(wrong), record)
    better = thoughts.improve(record, verdict, rng)
    reflection = thoughts.reflect(record, verdict, better, thoughts.plan(record, scene))
    assert thoughts.read_faults(reflection) == verdict.faults
    assert thoughts.read_grid(reflection) == thoughts.grid(better)
    assert reflection.startswith("<think>") and reflection.endswith("</think>")


def test_a_reflection_lists_what_is_seen_at_each_place_of_the_plan_before_and_then_the_rest():
  cells = [thoughts.EMPTY] * 16
  cells[1], cells[4], cells[6] = "red star", thoughts.UNCLEAR, "pink ring"
  before = "Places: red star G, blue ring B, red star B, red star C. Cells:"
  assert thoughts.listed(cells, thoughts.read_places(before)) == (
      "Things: G pink ring, B red star, B red star, C empty ground, E unclear shape.")


def test_the_places_of_a_reflection_are_those_of_its_final_prompt():
  for record, scene, rng in cases(20, seed=7):
    verdict = verifier.judge(seen(world.Scene(scene.background, scene.things[1:])), record)
    better = thoughts.improve(record, verdict, rng)
    plan = thoughts.plan(record, scene)
    reflection = thoughts.reflect(record, verdict, better, plan)
    assert thoughts.read_places(reflection) == sorted(
        thoughts.read_places(thoughts.plan(record, better)))
    last = thoughts.reflect(record, verifier.judge(seen(better), record), better, reflection)
    assert "short: nothing" in last and thoughts.read_places(last) == sorted(
        thoughts.read_places(reflection))


@pytest.mark.parametrize("plan", ["a red circle", "Places: .", "Places: red star A, ring B."])
def test_a_plan_without_readable_places_makes_no_trajectory(plan):
  record, scene, rng = next(cases(1))
  with pytest.raises(thoughts.Inexpressible, match="cannot be read"):
    datasets.trajectory_rows(record, plan, paint(scene), verifier.judge(seen(scene), record),
                             scene, rng).__next__()


def test_reflections_in_words_alone_are_on_careful_and_on_careless_plans():
  rng, careless, right, twice = np.random.default_rng(0), [], [], 0
  for _ in range(200):
    _, row = datasets._reflected(rng, world.WORLD1)
    *_, plan, thought = datasets.texts(row)
    letters = thoughts.read_places(plan)
    chosen = dict(zip("ABCDEFGHIJKLMNOP", thoughts.read_grid(plan)))
    places = re.findall("([a-z]+ [a-z]+) ([A-P])[,.]", plan)
    careless.append(any(chosen[letter] != thing for thing, letter in places))
    right.append(thoughts.read_faults(thought) == ())
    twice += len(set(letters)) < len(letters)
    assert not (right[-1] and len(set(letters)) < len(letters))
  assert 20 < sum(careless) < 120 and 60 < sum(right) < 140 and 10 < twice < 60


def test_the_better_image_is_right_and_keeps_what_was_right():
  for record, scene, rng in cases(80, seed=2):
    worse = world.Scene(scene.background, scene.things[1:])  # one thing is missing
    verdict = verifier.judge(seen(worse), record)
    better = thoughts.improve(record, verdict, rng)
    assert verifier.score(paint(better), record).correct
    assert set(worse.things) <= set(better.things)


def test_a_right_image_stays_as_it_is():
  for record, scene, rng in cases(20, seed=3):
    verdict = verifier.judge(seen(scene), record)
    assert thoughts.improve(record, verdict, rng).things == scene.things
    plan = thoughts.plan(record, scene)
    assert "keep everything" in thoughts.reflect(record, verdict, scene, plan)


def test_what_training_must_not_show_makes_no_trajectory():
  record, _, rng = next(cases(1))
  shape, color = sorted(world.WORLD1.unseen_pairs)[0]
  shown = verifier.Seen("grey", (world.Thing(shape, color, 20.0, 20.0, 6.0),), ())
  with pytest.raises(thoughts.Inexpressible, match="must not show"):
    thoughts.improve(record, verifier.judge(shown, record), rng)


def test_two_things_in_one_cell_make_no_trajectory():
  things = tuple(world.Thing("star", "red", x, 8.0, 5.5) for x in (3.0, 13.0))
  with pytest.raises(thoughts.Inexpressible, match="one cell"):
    thoughts.grid(world.Scene("grey", things))


def test_edits_turn_one_grid_into_the_other_in_words():
  before = [thoughts.EMPTY] * 16
  after = list(before)
  before[6], after[6], after[12] = "red star", "blue star", "pink ring"
  before[3] = thoughts.UNCLEAR
  assert thoughts.edits(before, after) == [
      "put empty ground D", "put blue star G", "put pink ring M", "keep the rest"]


def test_a_plan_places_things_in_the_order_in_which_the_prompt_names_them():
  include = [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}]
  for record, names in (({"include": include}, ["star", "ring"]),
                        ({"include": [include[0], {"class": "star", "count": 1}]},
                         ["ring", "star"])):
    scene = scenes.sample_scene(record, np.random.default_rng(0))
    assert re.findall("ring|star", thoughts.request(record)) == names
    places = thoughts.plan(record, scene).split("Places:")[1].split("Cells:")[0]
    assert re.findall("ring|star", places) == names


def test_like_things_of_a_plan_stand_in_the_order_of_their_cells():
  record = {"include": [{"class": "ring", "count": 2},
                        {"class": "star", "count": 3, "position": ["below", 0]}]}
  for seed in range(20):
    scene = scenes.sample_scene(record, np.random.default_rng(seed))
    named = thoughts.places(scene, record).split("Places: ")[1].rstrip(".").split(", ")
    words = [thing.split() for thing in named]
    assert [shape for _, shape, _ in words] == ["star"] * 3 + ["ring"] * 2
    letters = [letter for *_, letter in words]
    assert letters == sorted(letters[:3]) + sorted(letters[3:]) and len(set(letters)) == 5
    cells = thoughts.grid(scene)
    assert all(cells["ABCDEFGHIJKLMNOP".index(c)] == f"{a} {b}" for a, b, c in words)


def test_replayed_rows_are_words_to_be_copied_and_never_a_pair_that_is_held_out():
  rng = np.random.default_rng(0)
  unseen = {f"{color} {shape}" for shape, color in world.WORLD1.unseen_pairs}
  for _ in range(40):
    (_, reflected), (mode, copied) = datasets.replayed_rows(rng)
    assert parse_conversation(json.dumps(reflected), mode, 0).parts[-1].need_loss
    given, answer = datasets.texts(copied)
    cells = thoughts.read_grid(given)
    assert answer == f"{thoughts.listed(cells)} {given}" and set(cells) != {thoughts.EMPTY}
    assert not unseen & set(cells)


def test_a_trajectory_is_six_modes_that_the_reader_accepts():
  record, scene, rng = next(cases(1, seed=4))
  verdict = verifier.judge(seen(scene), record)
  plan = "<think> My own. Places: red star B. </think>"  # no cells: it cannot be retold
  rows = dict(datasets.trajectory_rows(record, plan, paint(scene), verdict, scene, rng))
  assert list(rows) == list(MODES)
  for mode, row in rows.items():
    parsed = parse_conversation(json.dumps(row), mode, 0)
    targets = [part for part in parsed.parts if part.need_loss]
    assert len(targets) == (2 if "full" in mode else 1)
  full = parse_conversation(json.dumps(rows["improving_full_learning"]), MODES[-1], 0).parts
  assert [part.text for part in full if isinstance(part, TextPart)][2] == plan
  first, last = (part for part in full if isinstance(part, ImagePart))
  assert first.need_vae and first.need_vit and not first.need_loss and last.need_loss


def test_an_image_of_a_later_round_stands_after_a_reflection_that_ends_in_its_plan():
  told = []
  for record, scene, rng in cases(60, seed=5):
    plan, verdict = thoughts.plan(record, scene), verifier.judge(seen(scene), record)
    rows = dict(datasets.trajectory_rows(record, plan, paint(scene), verdict, scene, rng))
    improving = [list(datasets.texts(rows[mode]))[2:] for mode in MODES[-2:]]
    assert improving[0] == improving[1]
    told.append(improving[0][0] != plan)
    assert thoughts.read_grid(improving[0][0]) == thoughts.read_grid(plan)
    letters = re.findall("[A-P]", improving[0][1].split("Things:")[1].split("What")[0])
    assert letters == thoughts.read_places(improving[0][0])  # of what stands in the context
    assert (thoughts.read_faults(improving[0][0]) is not None) == told[-1]
  assert 5 < sum(told) < 30


def test_the_scene_of_a_plan_is_what_it_says_and_none_where_it_says_nothing():
  for record, scene, _ in cases(20, seed=6):
    read = thoughts.read_scene(thoughts.plan(record, scene))
    assert read.background == scene.background
    assert thoughts.grid(read) == thoughts.grid(scene)
  assert thoughts.read_scene("<think> a red circle </think>") is None


def test_the_base_looks_at_images_that_are_not_as_planned_and_says_what_is_unclear():
  rng, told = np.random.default_rng(0), []
  for _ in range(80):
    mode, row = datasets._looked_after_plan(rng, world.WORLD1)
    parts = parse_conversation(json.dumps(row), mode, 0).parts
    plan, answer = (part.text for part in parts if isinstance(part, TextPart) and
                    "Cells" in part.text)
    data, = (part.data for part in parts if isinstance(part, ImagePart))
    image = np.asarray(Image.open(io.BytesIO(data)))
    cells, shown = thoughts.read_grid(answer), verifier.look(image)
    assert cells == thoughts.grid(shown)
    told.append((cells == thoughts.read_grid(plan), thoughts.UNCLEAR in cells))
  as_planned, unclear = np.mean(told, 0)
  assert 0.4 < as_planned < 0.9 and 0.05 < unclear < 0.4


def test_the_base_learns_from_rows_that_the_reader_accepts_and_no_unseen_pair():
  unseen = {f"{color} {shape}" for shape, color in world.WORLD1.unseen_pairs}
  for mode, row in datasets.base_rows(300, np.random.default_rng(0)):
    parse_conversation(json.dumps(row), mode, 0)
    assert not any(pair in words for words in datasets.texts(row) for pair in unseen)


def test_the_tokenizer_has_a_token_for_each_word_of_the_world(tmp_path):
  rng = np.random.default_rng(0)
  texts = [t for _, row in datasets.base_rows(1500, rng) for t in datasets.texts(row)]
  train_tokenizer(tmp_path, texts, 512)
  words = load_tokenizer(tmp_path, 512)
  for word in (*world.WORLD1.shapes, *world.COLORS, *world.BACKGROUNDS):
    assert len(words.encode(f" {word}")) == 1
  anything = "Ünknown wörds <|im_end|> 12"
  assert words.decode(words.encode(anything)) == anything


def test_scaling_the_latents_leaves_the_reconstruction_as_it_was():
  config = config_lib.VaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1)
  params = jax.device_get(vae._init(config, jax.random.key(0)))
  images = vae.paint_both(6, np.random.default_rng(0))[:3]  # crowded scenes
  scaled = vae.normalise(config, params, images)
  model, pixels = Vae(config), to_pixels(images)

  @jax.jit
  def through(p):
    mean, logvar = model.apply({"params": p}, pixels, method="encode")
    latents = sample_latents(config, mean, logvar)
    return latents, mean / jnp.exp(0.5 * logvar), model.apply(
        {"params": p}, latents, method="decode")

  (_, width, out), (latents, scaled_width, scaled_out) = through(params), through(scaled)
  np.testing.assert_allclose(scaled_out, out, atol=1e-4)
  np.testing.assert_allclose(scaled_width, width, rtol=1e-3, atol=1e-3)  # the posterior too
  shifted = latents + config.scale_factor * config.shift_factor
  np.testing.assert_allclose(np.sqrt((shifted**2).mean((0, 1, 2))), 1.0, rtol=1e-3)


@pytest.mark.long
def test_the_autoencoder_goes_on_where_it_was_stopped(tmp_path):
  config = config_lib.VaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1)
  options = dict(batch=1, learning_rate=1e-3, images=4, seed=0)
  whole = vae.train(config, tmp_path / "whole", steps=4, **options)
  with pytest.raises(KeyboardInterrupt):
    vae.train(config, tmp_path / "cut", steps=4, save_every=1, progress=_stop_at(3), **options)
  again = vae.train(config, tmp_path / "cut", steps=4, **options)
  jax.tree.map(np.testing.assert_array_equal, whole, again)


def _stop_at(step):
  def progress(kind, number, done, total):
    if done == step:
      raise KeyboardInterrupt

  return progress


def test_settings_of_a_run_are_checked_by_name():
  assert run.load(ROOT_CONFIG).generate.height == world.SIZE
  with pytest.raises(ValueError, match="trajectories"):
    run.load(ROOT_CONFIG, ["trajectories=0"])
  with pytest.raises(ValueError, match="no field 'trajectory'"):
    run.load(ROOT_CONFIG, ["trajectory=5"])
