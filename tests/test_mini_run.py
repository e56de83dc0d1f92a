"""`irg mini run`: its steps follow from each other, and a stopped one goes on."""

import dataclasses
import json
import os
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest

from conftest import ROOT
from irg_jax import sharding, storage, weights
from irg_jax.data import parquet, sources
from irg_jax.data.records import MODES
from irg_jax.generate.generator import load_model
from irg_jax.generate.settings import read_defaults
from irg_jax.mini import (
    datasets, report, run, scenes, thoughts, trajectories, vae, verifier, world)
from irg_jax.mini.scenes import paint

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
  drawn = [scenes.sample_scene(r if i % 2 else world.training_record(rng), rng)
           for i, r in enumerate(records)]
  np.savez(folder / "000000.npz", records=json.dumps(records),
           thoughts=[thoughts.plan(r, s) for r, s in zip(records, drawn)],
           pictures=np.stack([paint(s) for s in drawn]))


def test_other_settings_do_not_go_on_with_a_run(tmp_path, tiny):
  run.check_same(tiny, tmp_path)
  run.check_same(tiny, tmp_path)
  with pytest.raises(ValueError, match="seed=0, not 1"):
    run.check_same(dataclasses.replace(tiny, seed=1), tmp_path)


def test_a_preset_of_a_run_has_trainings_of_its_own(monkeypatch, tmp_path):
  trained = []
  monkeypatch.setattr(run, "_prepare", lambda *_: None)
  monkeypatch.setattr(run.train_run, "run_train", lambda s, out: trained.append(s))
  quick = run.load("configs/mini.py:quick")
  (tmp_path / "base_rows").mkdir()
  for train in (run.train_base, run.train_quality, run.train_irgl):
    train(quick, tmp_path)
  whole = run.load("configs/mini.py")
  assert whole == run.load("configs/mini.py:world") and whole.base_rows > 10 * quick.base_rows
  assert [s.model for s in trained] == [quick.model] * 3 and quick.model != whole.model
  assert all(s.stage2.steps <= 500 for s in trained)
  with pytest.raises(ValueError, match="no preset 'quik'"):
    run.load("configs/mini.py:quik")


def test_the_second_world_s_model_reads_prompts_as_typed_and_knows_its_words():
  first, second = (run.defaults(run.load(f"configs/mini.py:{name}")).prompts
                   for name in ("world", "world2"))
  assert first.rules and not second.rules and (first.most, second.most) == (5, 12)
  assert "ring" in first.note and "heart" in second.note and "striped" in second.note
  assert "one to 12 shapes" in second.note and "one to five shapes" in first.note


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
  parquet.write(tmp_path / "rows", trajectories.trajectory_rows(tiny, tmp_path / "first", counts))
  assert counts["right"] >= 4 and counts["right"] + counts["wrong"] == 8
  sources.build(tmp_path / "rows", tmp_path / "built")
  opened = sources.open_sources(tmp_path / "built", MODES)
  assert {mode: len(source) for mode, source in opened.items()} == dict.fromkeys(MODES, 8) | {
      datasets.TELL: 8 * 3}  # with words alone that are replayed


def test_trajectories_with_few_wrong_images_say_so_and_those_with_enough_do_not(
    tmp_path, tiny, capsys):
  rng = np.random.default_rng(0)
  records = [world.training_record(rng) for _ in range(10)]
  for wrong, said in ((0, True), (5, False)):
    out = tmp_path / str(wrong)
    (out / "first_rounds").mkdir(parents=True)
    drawn = [scenes.sample_scene(record, rng) for record in records]
    shown = [dataclasses.replace(s, things=s.things[i < wrong:]) for i, s in enumerate(drawn)]
    np.savez(out / "first_rounds" / "000000.npz", records=json.dumps(records),
             thoughts=[thoughts.plan(r, s) for r, s in zip(records, drawn)],
             pictures=np.stack([paint(s) for s in shown]))
    trajectories.write_trajectories(tiny, out)
    assert ("altered_plans" in capsys.readouterr().out) == said
    assert json.loads((out / "trajectories.json").read_text())["wrong"] == wrong


def test_trajectories_follow_from_the_base_model_and_are_made_once(tmp_path, tiny, monkeypatch):
  made = []
  monkeypatch.setattr(trajectories, "sample_first_rounds", lambda settings, weights, out: (
      made.append(weights), first_images(out, tiny)))
  monkeypatch.setattr(run, "_prepare", lambda *args: made.append(args[2:4]))
  for _ in range(2):
    run.make_trajectories(tiny, tmp_path)
  assert made == [run.base_weights(tmp_path), *[("trajectories", "irgl_data")] * 2]


@pytest.mark.long
def test_first_images_after_altered_plans_are_wrong_where_the_plan_is_right(tmp_path):
  settings = dataclasses.replace(run.load("configs/mini.py"), trajectories=12, sample_batch=12,
                                 altered_plans=1.0)
  settings = dataclasses.replace(settings, generate=dataclasses.replace(
      settings.generate, steps=10))
  trajectories.sample_first_rounds(settings, storage.SHIPPED, tmp_path / "rounds")
  found = np.load(tmp_path / "rounds" / "000000.npz")
  records = json.loads(str(found["records"]))
  planned = [verifier.Seen("white", thoughts.read_scene(str(plan)).things, ())
             for plan in found["thoughts"]]
  assert sum(verifier.judge(s, record).correct for s, record in zip(planned, records)) >= 8
  right = [verifier.score(*pair).correct for pair in zip(found["pictures"], records)]
  assert sum(right) <= 3


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
    trajectories.write_trajectories(tiny, tmp_path)
  assert not (tmp_path / "trajectories").exists()


@pytest.mark.long
def test_the_quick_preset_goes_from_nothing_to_a_table_and_finds_all_done_again(tmp_path):
  command = [sys.executable, "-m", "irg_jax", "mini", "run", "--config", "configs/mini.py:quick",
             "--out", str(tmp_path)]
  made = []
  for _ in range(2):  # as users run it, not with the devices and the compiler of these tests
    subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, check=True)
    made.append({path: path.stat().st_mtime_ns for name in ("*.safetensors", "*/samples/*.png")
                 for path in tmp_path.rglob(name)})
  assert made[0] == made[1] and len([p for p in made[0] if p.suffix == ".png"]) == 9 * 32
  quick, base, checkpoint = (run.load("configs/mini.py:quick"), run.base_weights(tmp_path),
                             tmp_path / "checkpoint")
  assert read_defaults(base) == read_defaults(checkpoint)
  assert read_defaults(base).settings == quick.generate
  assert read_defaults(base).system_prompt == thoughts.SYSTEM_PROMPT
  model, params = load_model(checkpoint, sharding.make_mesh(None), None, print)
  assert model.config.dtype == params["vae"]["decoder"]["conv_in"]["kernel"].dtype == "float32"
  _, stored = weights.load_checkpoint(checkpoint)
  assert {x.dtype.name for x in jax.tree.leaves(stored)} == {"bfloat16"}
  counts = json.loads((tmp_path / "trajectories.json").read_text())
  assert sum(counts.values()) == quick.trajectories
  arms = json.loads((tmp_path / "report" / "report.json").read_text())["arms"]
  assert {name: len(arm["rounds"]) for name, arm in arms.items()} == {
      arm.name: arm.rounds for arm in report.ARMS}  # one image a prompt has no best of two
  for arm in arms.values():
    for entry in arm["rounds"].values():
      assert entry["pictures"] == 32
      assert set(entry["scores"]["seen"]["tasks"]) == set(world.WORLD1.tasks)
