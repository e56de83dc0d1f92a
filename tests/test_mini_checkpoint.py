"""The checkpoint that comes with the package: small, whole, and it draws what is asked for."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from irg_jax import cli, sharding, text, weights
from irg_jax.generate import defaults, irg
from irg_jax.generate import run as generate_run
from irg_jax.mini import tasks, thoughts, verifier, world

PROMPT = "two red circles left of a blue star"
RECORD = {"include": [{"class": "star", "count": 1, "color": "blue"},
                      {"class": "circle", "count": 2, "color": "red", "position": ["left of", 0]}]}


def test_it_is_small_and_comes_with_its_card_and_figures():
  folder = defaults.CHECKPOINT
  assert sum(p.stat().st_size for p in folder.rglob("*")) <= 25e6
  card = (folder / "README.md").read_text(encoding="utf-8")
  scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
  for split in ("seen", "unseen"):
    overall = scores["arms"]["irg"]["rounds"]["2"]["scores"][split]["overall"]
    assert f"{overall['value']:.3f}"[1:] in card


def test_its_pictures_are_those_of_its_own_thoughts_at_any_batch():
  mesh = sharding.make_mesh(None)
  settings, system_prompt = defaults.read(defaults.CHECKPOINT)
  rng = np.random.default_rng(0)
  prompts = [PROMPT, *(tasks.training_record(rng)["prompt"] for _ in range(3))]
  with jax.set_mesh(mesh):
    model, params = generate_run.load_model(defaults.CHECKPOINT, mesh, None, lambda *a, **k: None)
    words = text.load_tokenizer(defaults.CHECKPOINT, model.config.llm.vocab_size)
    draw = lambda asked, seeds: irg.generate(
        model, params, words, asked, seeds=seeds, settings=settings, system_prompt=system_prompt)
    together, (alone,) = draw(prompts, range(4)), draw(prompts[:1], [0])
  for a, b in zip(together[0].rounds, alone.rounds):
    assert a.thought.text == b.thought.text
    assert np.abs(a.picture.astype(int) - b.picture.astype(int)).max() <= 1
  planned = [thoughts.read_grid(t.rounds[-1].thought.text) for t in together]
  seen = [verifier.look(t.rounds[-1].picture) for t in together]
  assert sum(p == thoughts.grid(s.things, s.unclear) for p, s in zip(planned, seen)) >= 3
