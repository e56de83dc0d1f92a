"""The shipped model: its size, its images, batches and devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from irg_jax import sharding, weights
from irg_jax.evaluate import score
from irg_jax.generate import generator, irg
from irg_jax.generate.settings import read_defaults
from irg_jax.mini import benchmark, report, thoughts, vae, verifier, world
from irg_jax.storage import SHIPPED
from irg_jax.tokenizer import load_tokenizer

FOLDER = SHIPPED
DEMO = {"prompt": "two red circles left of a blue star",
        "include": [{"class": "star", "count": 1, "color": "blue"},
                    {"class": "circle", "count": 2, "color": "red", "position": ["left of", 0]}]}


@pytest.fixture(scope="module")
def one_device():
  """Model, parameters, tokenizer, and the mesh of one device that they are on."""
  mesh = sharding.make_mesh(None, jax.devices()[:1])
  return (*load(mesh), mesh)


def load(mesh):
  with jax.set_mesh(mesh):
    model, params = generator.load_model(FOLDER, mesh, None, lambda *args: None)
  words = load_tokenizer(FOLDER, model.config.llm.vocab_size)
  return model, params, words


def draw(model, params, words, mesh, prompts, seeds, **changes):
  defaults = read_defaults(FOLDER)
  settings = dataclasses.replace(defaults.settings, **changes)
  with jax.set_mesh(mesh):
    return irg.generate(model, params, words, prompts, seeds=seeds, settings=settings,
                        system_prompt=defaults.system_prompt)


@pytest.fixture(scope="module")
def alone(one_device):
  """The demo's prompt with seed 0, by itself, on one device."""
  model, params, words, mesh = one_device
  return draw(model, params, words, mesh, [DEMO["prompt"]], [0])[0]


def assert_same(got, wanted):
  """The same thoughts, and images equal but for a level of rounding here and there."""
  for a, b in zip(got.rounds, wanted.rounds, strict=True):
    assert a.thought.text == b.thought.text
    apart = np.abs(a.image.astype(int) - b.image.astype(int))
    assert apart.max() <= 1 and (apart == 0).mean() >= 0.99


def test_it_is_small_and_its_card_holds_its_scores():
  assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 25e6
  recorded = json.loads((FOLDER / score.SCORES).read_text())
  card = (FOLDER / "README.md").read_text()
  for table in report.tables(recorded):
    assert report.markdown_table(*table) in card
  assert recorded["test"]["prompts"] == 264
  assert set(recorded["arms"]["irg"]["rounds"]) == set("1234")


def test_both_images_of_the_demo_s_prompt_are_right(alone):
  for entry in alone.rounds:
    verdict = verifier.score(entry.image, DEMO | {"exclude": []})
    assert verdict.correct, verdict.faults
    assert benchmark.seen_grid(verdict.seen) == thoughts.read_grid(entry.thought.text)


def batch(size):
  """(prompts, seeds) of other images with the demo's among them, and its place."""
  rng, place = np.random.default_rng(3), size // 2 - 1
  prompts = [world.training_record(rng)["prompt"] for _ in range(size)]
  seeds = list(range(1, size + 1))
  prompts[place], seeds[place] = DEMO["prompt"], 0
  return prompts, seeds, place


@pytest.mark.long
@pytest.mark.parametrize("size", [4, 16])
def test_a_batch_draws_what_one_draws(alone, one_device, size):
  model, params, words, mesh = one_device
  prompts, seeds, place = batch(size)
  assert_same(draw(model, params, words, mesh, prompts, seeds)[place], alone)


@pytest.mark.long
def test_a_batch_on_eight_devices_draws_what_one_draws_alone(one_device):
  """A short thought, cut at the limit, and few steps."""
  short = dict(rounds=1, think_limit=24, steps=5)
  model, params, words, one = one_device
  alone, = draw(model, params, words, one, [DEMO["prompt"]], [0], **short)
  mesh = sharding.make_mesh(None)
  model, params, words = load(mesh)
  assert len(jax.tree.leaves(params)[0].sharding.device_set) == 8
  prompts, seeds, place = batch(2)
  drawn = draw(model, params, words, mesh, prompts, seeds, **short)[place]
  assert_same(drawn, alone)


def test_the_autoencoder_alone_keeps_an_image_right():
  config, params = weights.load_checkpoint(FOLDER, part="vae", dtype="float32",
                                           compute_dtype="float32")
  rng = np.random.default_rng(9)
  records = [world.training_record(rng) for _ in range(64)]
  assert np.mean(vae.round_trip(config.vae, params["vae"], records, rng)) >= 0.97
  recorded = json.loads((FOLDER / score.SCORES).read_text())["autoencoder"]
  assert recorded["right"] >= 0.99 * recorded["pictures"] and recorded["pictures"] == 528
