"""`irg mini run`: its steps follow from each other, and a stopped one goes on."""

import dataclasses
import json
import unittest.mock

import jax
import numpy as np
import pytest

from irg_jax import sharding, weights
from irg_jax.data import sources
from irg_jax.data.records import MODES
from irg_jax.generate.generator import load_model
from irg_jax.generate.settings import read_defaults
from irg_jax.mini import datasets, run, thoughts, vae, world
from irg_jax.mini.world import paint

TINY = ("vae_steps=2", "vae_batch=1", "vae_images=2", "base_rows=120", "trajectories=12",
        "sample_batch=8", "model.llm.num_layers=1", "model.llm.hidden_size=48",
        "model.llm.mlp_size=64", "model.vae.ch_mult=(1, 1, 1, 1)",
        "train=('stage1.steps=2', 'stage2.steps=2', 'data.rows=1', 'checkpoint_every=1')")


@pytest.fixture(scope="module")
def tiny():
  return run.load("configs/mini.py", TINY)


def first_images(folder, tiny):
  """Batches as the base model would leave them, here of painted images, half of them wrong."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  records = [world.training_record(rng) for _ in range(8)]
  scenes = [world.sample_scene(r if i % 2 else world.training_record(rng), rng)
            for i, r in enumerate(records)]
  np.savez(folder / "000000.npz", records=json.dumps(records),
           thoughts=[thoughts.plan(r, s) for r, s in zip(records, scenes)],
           pictures=np.stack([paint(s) for s in scenes]))


def test_other_settings_do_not_go_on_with_a_run(tmp_path, tiny):
  run.check_same(tiny, tmp_path)
  run.check_same(tiny, tmp_path)
  with pytest.raises(ValueError, match="seed=0, not 1"):
    run.check_same(dataclasses.replace(tiny, seed=1), tmp_path)


@pytest.mark.parametrize("train", (run.train_base, run.train_quality,
                                   run.train_irgl))
def test_trainings_have_the_sizes_of_the_run(tmp_path, tiny, monkeypatch, train):
  trained = []
  monkeypatch.setattr(run, "_prepare", lambda *_: None)
  monkeypatch.setattr(run.train_run, "run_train", lambda s, out: trained.append(s.model))
  (tmp_path / "base_rows").mkdir()
  train(tiny, tmp_path)
  assert trained == [tiny.model] and tiny.model.llm.hidden_size == 48


def test_an_autoencoder_that_is_given_is_not_trained(tmp_path, tiny, monkeypatch):
  texts = run.sample_texts(tiny, 1000)  # as many as the tokenizer of this test needs
  monkeypatch.setattr(run, "sample_texts", lambda settings: texts)
  train = unittest.mock.create_autospec(
      vae.train, side_effect=lambda config, *_, **__: vae._init(config, jax.random.key(0)))
  monkeypatch.setattr(vae, "train", train)
  for name in "abc":
    (tmp_path / name).mkdir()
  run.make_start(tiny, tmp_path / "a")
  first = tmp_path / "a" / "start" / "weights"
  given = dataclasses.replace(tiny, autoencoder=str(first), seed=1)
  run.make_start(given, tmp_path / "b")
  train.assert_called_once()
  kept, made = (weights.load_checkpoint(folder, part="vae")[1] for folder in
                (first, tmp_path / "b" / "start" / "weights"))
  jax.tree.map(np.testing.assert_array_equal, kept, made)
  model = dataclasses.replace(tiny.model, vae=run.load("configs/mini.py").model.vae)
  with pytest.raises(ValueError, match="'autoencoder'.*sizes"):
    run.make_start(dataclasses.replace(given, model=model), tmp_path / "c")


def test_what_falls_short_becomes_trajectories_in_six_modes(tmp_path, tiny):
  first_images(tmp_path / "first", tiny)
  counts = {"right": 0, "wrong": 0}
  run.parquet.write(tmp_path / "rows", run.trajectory_rows(tiny, tmp_path / "first", counts))
  assert counts["right"] >= 4 and counts["right"] + counts["wrong"] == 8
  sources.build(tmp_path / "rows", tmp_path / "built")
  opened = sources.open_sources(tmp_path / "built", MODES)
  assert {mode: len(source) for mode, source in opened.items()} == dict.fromkeys(MODES, 8) | {
      datasets.TELL: 8 * 3}  # with words alone that are replayed


def test_images_that_nothing_can_be_read_in_are_an_error(tmp_path, tiny):
  (tmp_path / "first_rounds").mkdir()
  rng = np.random.default_rng(0)
  records = [world.training_record(rng) for _ in range(tiny.trajectories)]
  red = np.zeros((len(records), 64, 64, 3), np.uint8) + np.array([250, 0, 0], np.uint8)
  for start in (0, 8):
    np.savez(tmp_path / "first_rounds" / f"{start:06}.npz", pictures=red[start:start + 8],
             records=json.dumps(records[start:start + 8]),
             thoughts=["?"] * len(red[start:start + 8]))
  with pytest.raises(ValueError, match="no known ground': 12"):
    run.write_trajectories(tiny, tmp_path)
  assert not (tmp_path / "trajectories").exists()


@pytest.mark.long
def test_the_whole_run_from_nothing_and_again(tmp_path, tiny, capsys):
  assert run.run(tiny, tmp_path, until="base") == 0
  base = run.base_weights(tmp_path)
  assert read_defaults(base).settings == tiny.generate
  assert read_defaults(base).system_prompt == thoughts.SYSTEM_PROMPT
  first_images(tmp_path / "first_rounds", tiny)
  np.savez(tmp_path / "first_rounds" / "000008.npz",
           **np.load(tmp_path / "first_rounds" / "000000.npz"))
  assert run.run(tiny, tmp_path, until="checkpoint") == 0
  assert read_defaults(tmp_path / "checkpoint") == read_defaults(base)
  model, params = load_model(tmp_path / "checkpoint", sharding.make_mesh(None), None, print)
  assert model.config.dtype == params["vae"]["decoder"]["conv_in"]["kernel"].dtype == "float32"
  _, stored = weights.load_checkpoint(tmp_path / "checkpoint")
  assert {x.dtype.name for x in jax.tree.leaves(stored)} == {"bfloat16"}
  before = (base / "ema.safetensors").stat().st_mtime_ns
  assert run.run(tiny, tmp_path, until="checkpoint") == 0  # finds everything done
  assert (base / "ema.safetensors").stat().st_mtime_ns == before
