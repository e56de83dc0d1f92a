"""Tiny runs of learning from rewards: a checkpoint, prompts, settings."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
from engine import SYSTEM_PROMPT, TINY, make_checkpoint

from irg_jax import config as config_lib
from irg_jax import sharding, storage, weights
from irg_jax.generate import generator
from irg_jax.generate.settings import Defaults
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.rl import batches, rollout, run
from irg_jax.rl.settings import RlSettings
from irg_jax.tokenizer import load_tokenizer

PROMPTS = [{"prompt": f"a thing number {i}", "tag": "even" if i % 2 == 0 else "odd"}
           for i in range(6)]
SATISFIED = "."
STOPS = "rollout.until_satisfied=true", "rollout.rounds=3"
# Bright: of the image. Low: the share of the thought's tokens with a low number, see `Letters`.
REWARDS = """
import numpy as np


def bright(record, trajectory):
  return trajectory.rounds[-1].image.mean() / 255


def low(record, trajectory):
  text = trajectory.rounds[-1].thought.text
  return float(np.mean([ord(c) < 0x4e00 + 160 for c in text])) if text else 0.0


def wrong(record, trajectory):
  return "much"
"""


class Letters:
  """A tokenizer that reads back whatever it is given to write: a letter a token."""

  def __init__(self, special):
    self.special = special

  def encode(self, text):
    return [ord(c) - 0x4e00 if ord(c) >= 0x4e00 else ord(c) % 256 for c in text]

  def decode(self, ids):
    return "".join(chr(0x4e00 + i) for i in ids)


class Content(Letters):
  """Its texts end in SATISFIED, which is no token, where the sum of their tokens is even."""

  def encode(self, text):
    return super().encode(text.replace(SATISFIED, ""))

  def decode(self, ids):
    return super().decode(ids) + SATISFIED * (sum(ids) % 2 == 0)


class Pleased(Content):
  """All its texts end in SATISFIED."""

  def decode(self, ids):
    return super().decode(ids).rstrip(SATISFIED) + SATISFIED


def make(folder: pathlib.Path) -> pathlib.Path:
  """A folder with checkpoint, prompts.jsonl and rewards.py."""
  make_checkpoint(folder / "checkpoint")
  (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in PROMPTS))
  (folder / "rewards.py").write_text(REWARDS)
  return folder


def settings(folder, *overrides, reward="bright") -> RlSettings:
  """Two prompts of three trajectories an iteration, two iterations, two rounds."""
  return config_lib.read(RlSettings(), overrides=[
      "model.dtype=float32", "model.remat=none", f"checkpoint={folder / 'checkpoint'}",
      f"prompts={folder / 'prompts.jsonl'}", f"reward={folder / 'rewards.py'}:{reward}",
      "iterations=2", "batch=2", "group=3", "learning_rate=1e-3", "rollout.batch_size=4",
      "rollout.steps=6", "image.window=2", "image.among=4", "image.clip=0.2", "checkpoint_every=1",
      "samples_every=0", *overrides])


@functools.cache
def policy(folder) -> tuple:
  """(generator on one device, settings of generation) of the checkpoint."""
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    config, params = weights.load_checkpoint(folder / "checkpoint", dtype="float32",
                                             compute_dtype="float32")
  words = Letters(load_tokenizer(folder / "checkpoint", config.llm.vocab_size).special)
  defaults = Defaults(system_prompt=SYSTEM_PROMPT, settings=TINY)
  loaded = generator.Generator(folder / "checkpoint", "f", defaults, words, mesh,
                               UnifiedTransformer(config), params)
  return loaded, settings(folder).rollout.settings(TINY)


@functools.cache
def stopping_policy(folder, words=Content) -> tuple:
  """`policy` whose reflections may end the rounds, three at most."""
  loaded, _ = policy(folder)
  loaded = dataclasses.replace(
      loaded, tokenizer=words(loaded.tokenizer.special),
      defaults=dataclasses.replace(loaded.defaults, satisfied=SATISFIED))
  return loaded, settings(folder, *STOPS).rollout.settings(TINY)


@functools.cache
def sampled(folder) -> list[rollout.Rollout]:
  """The trajectories of iteration 1."""
  loaded, generation = policy(folder)
  return rollout.sample(loaded, settings(folder), generation, PROMPTS[:2], 1,
                        folder / "rollouts", "same")


def rows(folder, *overrides, worth=None):
  """(Rows with axes [1, B], settings) of the trajectories of iteration 1."""
  loaded, generation = policy(folder)
  s = run.with_model(settings(folder, *overrides), folder / "checkpoint")
  found = sampled(folder)
  worth = np.random.default_rng(0).standard_normal((len(found), 2)) if worth is None else worth
  made = batches.make_rows(found, worth, worth, s, generation, loaded.defaults, loaded.tokenizer,
                           loaded.model.config)
  return batches.stack(made, s.accumulate), s


def lines(out) -> dict[int, dict]:
  """The figures of each iteration in the log, without times."""
  found = {}
  for text in (storage.path(out) / "log.jsonl").read_text().splitlines():
    line = json.loads(text)
    if "loss" in line:
      assert line["step"] not in found
      found[line["step"]] = {k: x for k, x in line.items()
                             if not k.startswith(("seconds", "memory", "tokens_per", "tflops"))}
  return found
