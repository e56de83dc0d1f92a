"""Watching a run: evaluations change no number of training, and are made once, the same anywhere."""

import json
import pathlib
import random
import shutil
import time
import types

import jax
import numpy as np
import pytest
import train_runs
from PIL import Image
from train_runs import cache, data

from irg_jax import commands, evaluate
from irg_jax.evaluate import base
from irg_jax.generate import generator
from irg_jax.mini import benchmark  # registers itself
from irg_jax.train import checkpoints, logs, watch

PROMPTS = ("a red circle", "a blue square", "two triangles", "a fox")  # split over the mesh
_DRAW = f"""
import runpy


def get_config():
  config = runpy.run_path({str(train_runs.ROOT / "configs" / "generate_tiny.py")!r})["get_config"]()
  config.update(height=32, width=32, steps=3, think_limit=8, max_prompt_tokens=30)
  config.vae_transform.update(max_size=32, min_size=16)
  config.vit_transform.update(max_size=28, min_size=14)
  return config
"""


def flags(data, out, mesh=None, **fields):
  """Arguments of a small watched run of stage 1."""
  (data / "prompts.txt").write_text("\n".join(PROMPTS))
  (data / "draw.py").write_text(_DRAW)
  (data / "draw_60.py").write_text(_DRAW.replace("max_prompt_tokens=30", "max_prompt_tokens=60"))
  return train_runs.flags(data, out, mesh, **{
      "run_stages": "stage1", "eval_every": 2, "data__held_out": 0.25,
      "watch__prompts": data / "prompts.txt", "watch__generate": data / "draw.py"} | fields)


def train(data, out, mesh=train_runs.MESH, **fields):
  return commands.main(flags(data, out, mesh, **fields))


def evaluations(out):
  """{step: line} of stage 1; no step twice."""
  found = [line for line in train_runs.lines(out) if "evaluation" in line]
  assert len(found) == len({line["step"] for line in found})
  return {line["step"]: line["evaluation"] for line in found}


def records(out):
  return {path.parent.name: json.loads(path.read_text())
          for path in sorted(out.glob("samples/stage1/*/evaluation.json"))}


def results(out):
  """The results of an evaluation, without its seconds."""
  return {step: record | {"seconds": None, "samples": [
      sample | {"rounds": [entry | {"seconds": None} for entry in sample["rounds"]]}
      for sample in record["samples"]]} for step, record in records(out).items()}


def images(out):
  return {str(path.relative_to(out)): np.asarray(Image.open(path))
          for path in sorted(out.glob("samples/*/*/*.png"))}


@pytest.fixture(scope="module")
def watched(data, cache, tmp_path_factory):
  """The folder of a run that was evaluated after steps 2 and 4, and never killed."""
  out = tmp_path_factory.mktemp("watched") / "out"
  assert train(data, out) == 0
  return out


@pytest.mark.long
def test_evaluations_change_no_number_of_training(watched, data, cache, tmp_path):
  out = tmp_path / "out"
  assert train(data, out, eval_every=0) == 0
  assert not (out / "samples").exists() and not evaluations(out)
  kept = lambda line: {name: x for name, x in line.items() if name in (
      "loss", "ce", "mse", "grad_norm", "learning_rate", "samples")}
  assert [kept(x) for x in train_runs.steps(out).values()] == [
      kept(x) for x in train_runs.steps(watched).values()]
  name = pathlib.Path("stage1", "weights", "ema.safetensors")
  assert (out / name).read_bytes() == (watched / name).read_bytes()


def test_both_rounds_of_every_prompt_are_drawn_and_written_with_their_thoughts(watched):
  for step, record in records(watched).items():
    assert [sample["prompt"] for sample in record["samples"]] == list(PROMPTS)
    for sample in record["samples"]:
      assert len(sample["rounds"]) == 2 and all(isinstance(x["think"], str) for x in sample["rounds"])
    assert set(record["seconds"]) == {"losses", "images", "compiling"}
  assert len(images(watched)) == 2 * 4 * 2
  assert all(image.shape == (32, 32, 3) for image in images(watched).values())
  page = (watched / "samples.html").read_text()
  for name in images(watched):
    assert f'src="{name}"' in page
  assert page.index("samples/stage1/4/1_1.png") < page.index("samples/stage1/2/1_1.png")


def test_the_log_and_the_curves_have_losses_by_mode_images_and_texts(watched):
  found = evaluations(watched)
  assert list(found) == [2, 4]
  losses = found[4]["losses"]
  assert {"loss", "ce", "mse", *(f"mse/{mode}" for mode in train_runs.MODES)} <= set(losses)
  assert losses["loss"] == pytest.approx(losses["ce"] + losses["mse"])
  assert found[4]["losses"]["loss"] < found[2]["losses"]["loss"]  # of weights that moved
  content = next((watched / "tensorboard" / "stage1").iterdir()).read_bytes()
  for name in (b"validation/loss", b"samples/1/round2", b"samples/3/thoughts", b"time/evaluating"):
    assert name in content


def test_held_out_records_are_never_in_a_training_batch(watched):
  trained = {tuple(sample) for step in train_runs.samples(watched) for sample in step}
  held = {tuple(sample) for record in records(watched).values() for sample in record["records"]}
  assert len(held) >= 4 and trained and not held & trained
  numbers = {i for _, i in held}
  assert not numbers & {i for _, i in trained}  # the same numbers in every mode


def test_the_shares_of_the_time_are_logged_and_make_a_whole(watched):
  shares = {name: x for name, x in train_runs.steps(watched)["stage1", 4].items()
            if name.startswith("time/")}
  assert sum(shares.values()) == pytest.approx(1) and shares["time/evaluating"] > 0


@pytest.mark.long
def test_evaluations_on_one_device_are_those_on_eight(watched, data, cache, tmp_path, monkeypatch):
  first = jax.devices()[:1]
  for name in ("devices", "local_devices"):
    monkeypatch.setattr(jax, name, lambda *_: first)
  monkeypatch.setattr(jax, "device_count", lambda *_: 1)
  assert train(data, tmp_path / "out", None) == 0
  assert_same(tmp_path / "out", watched)


def assert_same(out, watched):
  """The same evaluations but for rounding."""
  for step, line in evaluations(watched).items():
    other = evaluations(out)[step]["losses"]
    assert other.keys() == line["losses"].keys()
    for name, x in line["losses"].items():
      np.testing.assert_allclose(other[name], x, rtol=2e-5, err_msg=name)
  thoughts = lambda out: {step: [x["think"] for sample in record["samples"] for x in sample["rounds"]]
                          for step, record in records(out).items()}
  assert thoughts(out) == thoughts(watched)
  for name, image in images(watched).items():
    far = np.abs(image.astype(int) - images(out)[name])
    assert far.max() <= 2, name


class Killed(BaseException):
  """Stands for kill -9: nothing handles it."""


@pytest.mark.long
@pytest.mark.parametrize("name", ["evaluation", "write_json", "write_page", "_publish"])
def test_a_run_killed_in_an_evaluation_makes_it_again_and_no_other_one_twice(
    watched, data, cache, tmp_path, monkeypatch, name):
  out, drawn = tmp_path / "out", []
  draw = watch.Watch._draw
  monkeypatch.setattr(watch.Watch, "_draw", lambda self, params: drawn.append(1) or draw(self, params))
  place = {"write_json": watch.storage, "write_page": watch, "_publish": watch.Watch,
           "evaluation": logs.Log}[name]
  before = getattr(place, name)

  def killed(*args, **kwargs):
    if drawn and (name != "write_json" or "losses" in args[1]):
      raise Killed
    return before(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(place, name, killed)
    with pytest.raises(Killed):
      train(data, out)
  assert checkpoints.steps_in(out / "stage1" / "checkpoints") == [2]
  assert not evaluations(out)
  assert train(data, out) == 0
  assert len(drawn) == (3 if name == "write_json" else 2)  # a complete folder is not made again
  assert results(out) == results(watched) and list(evaluations(out)) == [2, 4]
  for path, image in images(watched).items():
    np.testing.assert_array_equal(images(out)[path], image)


@pytest.mark.long
def test_an_evaluation_after_the_last_checkpoint_is_logged_again_but_not_made_again(
    watched, data, cache, tmp_path, monkeypatch):
  out = tmp_path / "out"
  shutil.copytree(watched, out)
  shutil.rmtree(out / "stage1" / "checkpoints" / "4")
  shutil.rmtree(out / "stage1" / "weights")
  monkeypatch.setattr(watch.Watch, "_draw", lambda *_: pytest.fail("drawn again"))
  assert train(data, out) == 0
  assert evaluations(out) == evaluations(watched)
  clock = json.loads((out / "goodput.json").read_text())
  assert clock["starts"] == 2 and clock["updates_redone"] == 2


@pytest.mark.long
def test_a_run_without_prompts_or_held_out_records_has_the_other_half(watched, data, cache, tmp_path,
                                                                      capsys):
  assert train(data, tmp_path / "a", watch__prompts="", watch__generate="") == 0
  record = records(tmp_path / "a")["4"]
  assert record["samples"] == [] and record["losses"] == records(watched)["4"]["losses"]
  assert train(data, tmp_path / "b", data__held_out=0.0, stage1__steps=2) == 0
  record = records(tmp_path / "b")["2"]
  assert record["losses"] == {} and len(record["samples"]) == 4
  assert "no held-out records (data.held_out)" in capsys.readouterr().err


@pytest.mark.parametrize("fields, message", [
    ({"watch__prompts": "nowhere.txt"}, "config field 'watch.prompts' is 'nowhere.txt', but must be"),
    ({"watch__generate": "nowhere.py"}, "config file nowhere.py: no such file"),
    ({"watch__generate": train_runs.ROOT / "configs" / "generate.py"}, "is more than the 128 pixels"),
])
def test_prompts_and_settings_that_cannot_work_are_named_before_anything_is_written(
    data, tmp_path, capsys, fields, message):
  assert train(data, tmp_path / "out", None, **fields) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_two_processes_evaluate_as_one_does(watched, data, cache, tmp_path):
  (data / "prompts.txt").write_text("\n".join(PROMPTS))
  for worker in train_runs.two_processes(flags(data, tmp_path / "out", train_runs.MESH), cache):
    text, _ = worker.communicate(timeout=600)
    assert worker.returncode == 0, text
  assert_same(tmp_path / "out", watched)


@pytest.mark.long
def test_real_kills_leave_the_samples_and_losses_of_an_undisturbed_run(watched, data, cache,
                                                                      tmp_path):
  out, rng, kills = tmp_path / "out", random.Random(0), 0
  while kills < 4:
    running = train_runs.process(flags(data, out, train_runs.MESH), cache, devices=8)
    due, log = rng.randint(0, 2), out / "log.jsonl"
    before = log.read_bytes().count(b"\n") if log.exists() else 0
    while running.poll() is None and (
        not log.exists() or log.read_bytes().count(b"\n") < before + due):
      time.sleep(0.01)
    time.sleep(rng.random())
    running.kill()
    text, _ = running.communicate()
    kills += 1
    if running.returncode == 0:
      break
  running = train_runs.process(flags(data, out, train_runs.MESH), cache, devices=8)
  text, _ = running.communicate()
  assert running.returncode == 0, text
  assert list(evaluations(out)) == [2, 4]
  assert_same(out, watched)


# --- a benchmark


def examined(monkeypatch, right=lambda item, image: image.mean() > 120 + 10 * len(item.id) % 7):
  """Lets a benchmark of eight prompts judge images; returns what it is asked."""
  asked, mini = [], evaluate.get("mini")

  def judge(item, image):
    asked.append((item.id, image.copy()))
    return right(item, image)

  monkeypatch.setattr(mini, "right", judge, raising=False)
  return asked


def examine(data, out, mesh=train_runs.MESH, **fields):
  """A run with the benchmark alone."""
  return train(data, out, mesh, **{"watch__generate": data / "draw_60.py"} | EXAM | fields)


EXAM = {"watch__prompts": "", "data__held_out": 0.0, "watch__benchmark": "mini",
        "watch__benchmark_limit": 5, "watch__batch_size": 4}


def test_the_share_of_right_images_is_each_round_s_and_what_is_not_finite_is_wrong():
  drawn = lambda *images: types.SimpleNamespace(rounds=[
      types.SimpleNamespace(image=x, latents=np.array([x], np.float32)) for x in images])
  stand_in = types.SimpleNamespace(
      _exam=watch.Exam(("a", "b", "c"), (5, 6, 7), lambda number, image: not image == number),
      _trajectories=lambda params, prompts, seeds: enumerate(
          [drawn(0, 1), drawn(2, 2), drawn(np.nan, 1)]))
  assert watch.Watch._examine(stand_in, None) == {"round1": 1 / 3, "round2": 1.0}


@pytest.mark.long
def test_a_benchmark_s_first_prompts_are_drawn_with_its_seeds_and_judged_round_by_round(
    data, cache, tmp_path, monkeypatch, capsys):
  drawn, batch = [], generator.Generator.batch
  monkeypatch.setattr(generator.Generator, "batch", lambda self, prompts, seeds, *a, **k: (
      drawn.extend(zip(prompts, seeds)) or batch(self, prompts, seeds, *a, **k)))
  asked = examined(monkeypatch, lambda item, image: item.id in ("00000", "00003"))
  assert examine(data, tmp_path / "out", None, stage1__steps=2) == 0
  items = evaluate.get("mini").read()[:5]
  assert drawn == [(item.prompt, base.seed("mini", item.id, 0)) for item in items]
  assert [name for name, _ in asked[1:]] == [item.id for item in items for _ in range(2)]
  assert evaluations(tmp_path / "out")[2]["benchmark"] == {"round1": 0.4, "round2": 0.4}
  content = next((tmp_path / "out" / "tensorboard" / "stage1").iterdir()).read_bytes()
  assert b"benchmark/mini/round2" in content
  assert "mini round1 0.400, mini round2 0.400" in capsys.readouterr().err
  assert "round1 0.400, round2 0.400" in (tmp_path / "out" / "samples.html").read_text()
  assert set(records(tmp_path / "out")["2"]["seconds"]) == {
      "losses", "images", "benchmark", "compiling"}


@pytest.mark.long
def test_a_benchmark_changes_no_number_of_training_and_resumes_with_the_same_share(
    data, cache, tmp_path, monkeypatch):
  """Killed after the folder of the first evaluation was written; on eight devices."""
  asked = examined(monkeypatch)
  assert examine(data, tmp_path / "whole") == 0
  publish = watch.Watch._publish
  with monkeypatch.context() as patch:
    patch.setattr(watch.Watch, "_publish", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
      examine(data, tmp_path / "out")
  count = len(asked)
  assert examine(data, tmp_path / "out") == 0
  assert len(asked) == count + 1 + 10  # the check at the start, and the second evaluation alone
  shares = [{step: line["benchmark"] for step, line in evaluations(tmp_path / name).items()}
            for name in ("whole", "out")]
  assert shares[0] == shares[1] and list(shares[0]) == [2, 4]
  assert train(data, tmp_path / "without", data__held_out=0.0, eval_every=0) == 0
  name = pathlib.Path("stage1", "weights", "ema.safetensors")
  assert len({(tmp_path / run / name).read_bytes() for run in ("whole", "out", "without")}) == 1


@pytest.mark.long
def test_a_benchmark_on_one_device_has_the_images_of_eight(data, cache, tmp_path, monkeypatch):
  asked = examined(monkeypatch)
  assert examine(data, tmp_path / "eight") == 0
  eight = asked.copy()
  asked.clear()
  first = jax.devices()[:1]
  for name in ("devices", "local_devices"):
    monkeypatch.setattr(jax, name, lambda *_: first)
  monkeypatch.setattr(jax, "device_count", lambda *_: 1)
  assert examine(data, tmp_path / "one", None) == 0
  for (name, image), (other, there) in zip(asked, eight, strict=True):
    assert name == other and np.abs(image.astype(int) - there).max() <= 2


@pytest.mark.parametrize("fields, message", [
    ({"watch__benchmark": "wise"}, "no judge and no detector are mini"),
    ({"watch__benchmark": "mni"}, "did you mean"),
    ({}, "config field 'watch.benchmark' is 'mini': an image of the mini world is uint8 [64, 64, 3]"),
])
def test_a_benchmark_that_cannot_be_scored_is_named_before_anything_is_written(
    data, tmp_path, capsys, fields, message):
  assert examine(data, tmp_path / "out", None, **fields) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
