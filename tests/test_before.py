"""Files of version 0.1.0 (tests/data/before): read, gone on from, and never paid for again."""

import json
import pathlib
import re
import shutil

import before_models
import pytest

from irg_jax import commands
from irg_jax.mini import report
from train_runs import cache

pytestmark = pytest.mark.usefixtures("on_one_device")
ROOT = pathlib.Path(__file__).resolve().parents[1]
BEFORE = pathlib.Path("tests", "data", "before")  # as the commands named it
FLAGS = json.loads((ROOT / BEFORE / "flags.json").read_text().replace("BEFORE", str(BEFORE)))
JUDGED = [name for name, flags in FLAGS["benchmarks"].items() if flags["judged"]]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def copy(tmp_path):
  """Copies a folder of version 0.1.0, as one that may be written to."""
  return lambda name: pathlib.Path(shutil.copytree(BEFORE / name, tmp_path / "copy"))


def irg(*arguments):
  return commands.main(list(map(str, arguments)))


def train(*arguments):
  """Exit status of `irg train`."""
  return irg("train", "--config", "configs/irgl.py", "--config.preset=tiny", *FLAGS["model"],
             *FLAGS["train"], "--config.data.held_out=0", "--config.eval_every=0",
             f"--config.checkpoint={BEFORE / 'published'}", *arguments)


def read(path):
  return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_weights(folder):
  names = ("ema.safetensors", "ae.safetensors")
  return all((folder / n).read_bytes() == (BEFORE / "published" / n).read_bytes() for n in names)


def test_both_layouts_of_a_checkpoint_read(tmp_path):
  assert irg("convert", BEFORE / "orbax", tmp_path / "published", "--to", "published") == 0
  assert same_weights(tmp_path / "published")
  assert irg("convert", BEFORE / "published", tmp_path / "orbax", "--to", "orbax") == 0
  assert irg("convert", tmp_path / "orbax", tmp_path / "again", "--to", "published") == 0
  assert same_weights(tmp_path / "again")


def test_a_checkpoint_of_training_reads(tmp_path):
  step = BEFORE / "train" / "stage1" / "checkpoints" / "2"
  assert irg("convert", step, tmp_path / "out", "--to", "published", "--dtype", "bfloat16") == 0
  assert not same_weights(tmp_path / "out")


def test_training_goes_on(copy, cache):
  run = copy("train")
  before = read_lines(run / "log.jsonl")
  goes_on = ["--out", run, f"--config.data.path={BEFORE / 'irgl'}"]
  assert train(*goes_on, "--config.stage1.steps=3") == 0
  lines = read_lines(run / "log.jsonl")
  assert lines[:len(before)] == before
  assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
  assert (run / "stage1" / "weights" / "ema.safetensors").is_file()


def test_training_of_other_settings_does_not_go_on(copy, capsys):
  goes_on = ["--out", copy("train"), f"--config.data.path={BEFORE / 'irgl'}"]
  assert train(*goes_on, "--config.seed=1", "--config.stage1.steps=3") == 2
  assert "seed=0" in capsys.readouterr().err


def test_latents_train(cache, tmp_path):
  assert train("--out", tmp_path / "run", "--config.stage1.steps=1",
               f"--config.data.path={BEFORE / 'latents'}") == 0
  line, = [line for line in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in line]
  # The same samples and the same draws as from the images.
  first = next(e for e in read_lines(BEFORE / "train" / "log.jsonl") if "loss" in e)
  assert line["samples"] == first["samples"]
  assert line["loss"] == pytest.approx(first["loss"], rel=1e-3)


def test_latents_that_are_there_are_not_made_again(copy, capsys):
  assert irg("data", "encode-latents", BEFORE / "irgl", "--checkpoint", BEFORE / "published",
             "--out", copy("latents"), "--mode", *FLAGS["modes"], "--size", 16, 32, 4) == 0
  assert f"{FLAGS['modes'][0]}: there" in capsys.readouterr().out


def test_built_data_is_counted(capsys, tmp_path):
  for folder in ("irgl", "latents"):
    assert irg("data", "check", BEFORE / folder, "--mode", *FLAGS["modes"], "--out",
               tmp_path / "page.html") == 0
    assert "4 of 5 rows usable\n  1 bad_json\n" in capsys.readouterr().out


def shape(value):
  """The keys of JSON, all the way down."""
  if isinstance(value, dict):
    return {key: shape(v) for key, v in value.items()}
  return [shape(v) for v in value] if isinstance(value, list) else None


def test_a_trace_is_known_as_one_and_replaced(copy):
  folder = copy("trace")
  before = read(folder / "trace.json")
  assert irg("generate", "a fox", *FLAGS["draw"], "--rounds", 1, "--checkpoint",
             BEFORE / "published", "--out", folder) == 0
  names = {p.name for p in (BEFORE / "trace").iterdir()}
  assert {p.name for p in folder.iterdir()} == names - {"round2.png"}
  now = read(folder / "trace.json")
  for trace in (before, now):
    for key in ("versions", "settings"):
      trace.pop(key, None)
  assert now.pop("fingerprint") and now["rounds"][0].pop("sha256") and now["rounds"][0].pop("passes")
  assert shape(now).keys() == shape(before).keys()
  assert shape(now["rounds"][0]).keys() == shape(before["rounds"][0]).keys()


@pytest.mark.parametrize("name", FLAGS["benchmarks"])
def test_a_drawn_benchmark_is_not_drawn_again(name, copy, capsys):
  flags, out = FLAGS["benchmarks"][name], copy(f"eval/{name}")
  count = len(list((out / "traces").rglob("*.json")))
  again = ["eval", "generate", name, *flags["prompts"], *flags["generate"], *FLAGS["draw"],
           "--checkpoint", BEFORE / "published", "--out", out]
  assert irg(*again) == 0
  assert re.search(rf": 0 \w+ drawn, {count} were there", capsys.readouterr().out)
  assert irg(*again, "--steps", 4) == 2
  assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", FLAGS["benchmarks"])
def test_nothing_is_asked_or_measured_again(name, copy, monkeypatch):
  def fails(*_):
    raise AssertionError("asked again")

  for model in ("detect", "classify", "vqascore"):
    monkeypatch.setattr(before_models, model, fails)
  if name in JUDGED:
    pytest.importorskip("openai", reason="the judge's client needs the extra `eval`")
  flags, out = FLAGS["benchmarks"][name], copy(f"eval/{name}")
  want = read(out / "scores.json"), read_lines(out / "items.jsonl")
  for path in (out / "scores.json", out / "items.jsonl"):
    path.unlink()
  nobody = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--tries", "1"]
  assert irg("eval", "score", name, *flags["prompts"], *flags["score"],
             *(nobody if name in JUDGED else []), "--out", out) == 0
  got = read(out / "scores.json"), read_lines(out / "items.jsonl")
  for scores, _ in (want, got):
    scores.get("judge", {}).pop("url", None)
  assert fields_of(got, want) == want


def fields_of(now, before):
  """`now` without the fields that a later version added to those of `before`."""
  if isinstance(before, dict):
    return {key: fields_of(value, before[key]) for key, value in now.items() if key in before}
  if isinstance(before, list | tuple):
    return type(before)(map(fields_of, now, before)) if len(now) == len(before) else now
  return now


def test_scores_are_reported(tmp_path):
  runs = [BEFORE / "eval" / name for name in FLAGS["benchmarks"]]
  assert irg("eval", "report", *runs, "--to", tmp_path) == 0
  page = "".join(p.read_text(encoding="utf-8") for p in sorted(tmp_path.rglob("*.md")))
  for title in ("GenEval", "WISE", "TIIF", "GenAI-Bench", "OneIG"):
    assert title in page
  scores = read(BEFORE / "eval" / "genai_bench" / "scores.json")["rounds"]
  assert all(f"{r['tags']['all']['score']:.2f}"[1:] in page for r in scores.values())


def test_a_run_of_the_mini_world_goes_on(copy, capsys):
  run = copy("mini")
  again = ["mini", "run", "--out", run, "--until", "autoencoder", *FLAGS["mini"]]
  assert irg(*again) == 0
  assert not list(run.rglob("*.safetensors")) and not (run / "vae.msgpack").exists()
  assert irg(*again, "--config.seed=1") == 2
  assert "seed" in capsys.readouterr().err


def test_an_evaluation_of_the_mini_world_gives_the_same_figures(copy):
  run = copy("mini")
  (run / "report" / "report.json").unlink()
  report.make(run)
  before = read(BEFORE / "mini" / "report" / "report.json")
  assert common(read(run / "report" / "report.json"), before) == before


def common(now, before):
  """The part of `now` that has a place in `before`: a report may say more than it did."""
  if isinstance(before, dict):
    return {key: common(now[key], value) for key, value in before.items() if key in now}
  return now
