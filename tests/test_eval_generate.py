"""`irg eval generate`: layout, seeds, resuming, sharding; at the end for real.

All else runs on a stand-in for the engine, whose images follow from prompt and seed.
"""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from irg_jax import commands
from irg_jax import evaluate, storage
from irg_jax.commands import eval as eval_verb
from irg_jax.evaluate import base, geneval
from irg_jax.evaluate import generate as runner
from irg_jax.generate import generator, irg
from irg_jax.progress import Progress

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = ["--config", str(ROOT / "configs" / "generate_tiny.py"), "--size", "32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights") / "tiny"
  assert commands.main(["init", "--config", str(ROOT / "configs" / "tiny.py"), "--out", str(folder),
                   "--config.model.llm.num_layers=1"]) == 0
  return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Made-up prompts in the official formats; None are those that come with the package."""
  folder = tmp_path_factory.mktemp("prompts")
  wise = [{"Prompt": f"prompt {i}", "Explanation": "why", "Category": "c", "Subcategory": "s",
           "prompt_id": i} for i in (901, 1, 450)]
  (folder / "wise.json").write_text(json.dumps(wise))
  (folder / "testmini_prompts").mkdir()
  (folder / "testmini_prompts" / "color+2d_prompts.jsonl").write_text("".join(json.dumps(
      {"type": "color+2d", "short_description": f"s {i}", "long_description": f"l {i}"}) + "\n"
      for i in range(2)))
  genai = {f"{i:05}": {"id": f"{i:05}", "prompt": f"prompt {i}"} for i in range(3)}
  (folder / "genai_image.json").write_text(json.dumps(genai))
  rows = ["category,id,prompt_en,type,prompt_length,class", "Portrait,000,a man,NP,short,",
          "Anime_Stylization,000,a fox,NP,short,", "Anime_Stylization,001,rain,NP,short,"]
  (folder / "OneIG-Bench.csv").write_text("\n".join(rows))
  return {"geneval": None, "wise": folder / "wise.json", "tiif": folder / "testmini_prompts",
          "genai_bench": folder / "genai_image.json", "oneig": folder / "OneIG-Bench.csv",
          "mini": None, "mini2": None}


class Engine:
  """Stands in for `irg.generate`; notes the (prompt, seed) of every row."""

  def __init__(self):
    self.batches, self.fails = [], set()

  def __call__(self, model, params, tokenizer, words, *, seeds, settings, system_prompt,
               on_progress, **_):
    self.batches.append(list(zip(words, seeds)))
    on_progress("draw", 0, 0, 1)
    return [irg.Trajectory(p, [self._round(p, s, n, settings) for n in range(settings.rounds)])
            for p, s in zip(words, seeds)]

  def _round(self, prompt, seed, number, settings):
    rng = np.random.default_rng([zlib.crc32(prompt.encode()), seed, number])
    latents = np.full((4, 8), np.nan if (seed, number) in self.fails else 0.0, np.float32)
    image = rng.integers(0, 256, (settings.height, settings.width, 3), np.uint8)
    return irg.Round(irg.Thought(f"thought {seed} {number}", (1, 2)), latents, image, {"draw": 1})


@pytest.fixture
def engine(monkeypatch):
  engine = Engine()
  monkeypatch.setattr(irg, "generate", engine)
  monkeypatch.setattr(generator, "load_model", lambda *_: (None, None))
  return engine


@pytest.fixture
def generate(checkpoint, files):
  def run(benchmark, out, *argv, subset=True):
    given = ["--prompts", str(files[benchmark])] if files[benchmark] else []
    return commands.main(["eval", "generate", benchmark, *given, "--checkpoint", str(checkpoint),
                     "--out", str(out), *TINY, *["--subset"] * (subset and bool(given)),
                     *map(str, argv)])
  return run


def tree(out):
  """Content by path: of traces without their times, which no two runs share."""
  found = {}
  for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != "run.json"):
    content = path.read_bytes()
    if path.suffix == ".json":
      content = json.loads(content)
      for entry in content["rounds"]:
        entry.pop("seconds")
    found[path.relative_to(out).as_posix()] = content
  return found


LAYOUTS = {
    "geneval": {f"{i:05}/{name}" for i in range(2) for name in
                ["metadata.jsonl", *[f"samples/{p:05}.png" for p in range(4)]]},
    "wise": {"1.png", "450.png"},
    "tiif": {f"color+2d/irg_jax/{length}_description/0.png" for length in ("short", "long")},
    "genai_bench": {"irg_jax/00000.jpeg", "irg_jax/00001.jpeg"},
    "oneig": {"images/human/irg_jax/000.webp", "images/anime/irg_jax/000.webp"},
}
LAYOUTS["mini"] = LAYOUTS["mini2"] = LAYOUTS["geneval"]


@pytest.mark.parametrize("benchmark", eval_verb.benchmarks())
def test_each_round_has_the_official_layout_to_itself(benchmark, engine, generate, tmp_path,
                                                      files, capsys):
  assert generate(benchmark, tmp_path, "--limit", 2, "--batch-size", 3) == 0
  items = evaluate.get(benchmark).read(files[benchmark])[:2]
  images = [(item, p) for item in items for p in range(item.images)]
  for number in (1, 2):
    root = tmp_path / f"round{number}"
    assert {f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()} \
        == LAYOUTS[benchmark]
  for item, p in images:
    record = base.read_trace(tmp_path, item, p)
    seed = base.seed(benchmark, item.id, p)
    assert (record["prompt"], record["seed"]) == (item.prompt, seed)
    assert [r["think"] for r in record["rounds"]] == [f"thought {seed} 0", f"thought {seed} 1"]
    for number, entry in enumerate(record["rounds"], 1):
      assert entry["picture"] == evaluate.get(benchmark).image_path(item, p, number).as_posix()
  assert not list(tmp_path.rglob(".aside"))
  assert f"{len(images)} images drawn, 0 were there already" in capsys.readouterr().out
  assert {row for batch in engine.batches for row in batch} \
      == {(i.prompt, base.seed(benchmark, i.id, p)) for i, p in images}


def test_geneval_s_record_is_as_published(engine, generate, tmp_path):
  assert generate("geneval", tmp_path, "--tasks", "counting", "--limit", 1) == 0
  line = geneval.FILES.joinpath("evaluation_metadata.jsonl").read_text().split("\n")[179]
  assert json.loads((tmp_path / "round2/00179/metadata.jsonl").read_text()) == json.loads(line)


def test_oneig_s_grid_holds_the_four_images_and_black_for_one_that_failed(
    engine, generate, tmp_path, files, capsys):
  item = evaluate.get("oneig").read(files["oneig"])[0]
  seeds = [base.seed("oneig", item.id, p) for p in range(4)]
  engine.fails = {(seeds[2], 1)}
  assert generate("oneig", tmp_path, "--limit", 1) == 0
  settings = dataclasses.replace(runner.Settings(), height=32, width=32)
  for number in (0, 1):
    drawn = [engine._round(item.prompt, s, number, settings).image for s in seeds]
    if number:
      drawn[2] = np.zeros_like(drawn[2])
    grid = np.array(Image.open(tmp_path / f"round{number + 1}/images/human/irg_jax/000.webp"))
    assert grid.shape == (64, 64, 3)
    cells = [grid[y:y + 32, x:x + 32] for y in (0, 32) for x in (0, 32)]  # row by row
    assert all(np.array_equal(cell, want) for cell, want in zip(cells, drawn))
  captured = capsys.readouterr()
  assert "1 failed" in captured.out and f"{item.id}, image 2, round 2" in captured.err
  assert not list((tmp_path / "cells").rglob("*.png"))
  assert generate("oneig", tmp_path, "--limit", 1) == 0  # is reported again, not drawn again
  assert "0 images drawn, 4 were there already; 1 failed" in capsys.readouterr().out


def test_a_image_that_failed_is_no_image(engine, generate, tmp_path):
  engine.fails = {(base.seed("wise", "1", 0), 0)}
  assert generate("wise", tmp_path) == 0
  assert not (tmp_path / "round1/1.png").exists() and (tmp_path / "round2/1.png").exists()


def test_batch_size_order_and_processes_change_no_file(engine, generate, tmp_path):
  assert generate("oneig", tmp_path / "one", "--batch-size", 1) == 0
  assert generate("oneig", tmp_path / "four", "--batch-size", 5) == 0
  for task in ("anime", "human"):  # another order
    assert generate("oneig", tmp_path / "tasks", "--tasks", task, "--batch-size", 3) == 0
  for i in (1, 0):
    assert generate("oneig", tmp_path / "shared", "--process-id", i, "--num-processes", 2) == 0
    assert generate("oneig", tmp_path / f"part{i}", "--process-id", i, "--num-processes", 2) == 0
  parts = [tree(tmp_path / f"part{i}") for i in (0, 1)]
  assert not set(parts[0]) & set(parts[1])  # so copying one into the other loses nothing
  want = tree(tmp_path / "one")
  assert len(want) == 3 * (4 + 2)
  assert want == tree(tmp_path / "four") == tree(tmp_path / "tasks") == tree(tmp_path / "shared")
  assert want == parts[0] | parts[1]


def test_a_batch_keeps_its_rows_when_it_is_resumed(engine, generate, tmp_path):
  assert generate("geneval", tmp_path, "--limit", 2, "--batch-size", 4) == 0
  before = engine.batches[:]
  (tmp_path / "traces/00001/2.json").unlink()
  (tmp_path / "round1/00000/samples/00001.png").unlink()
  times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
  assert generate("geneval", tmp_path, "--limit", 2, "--batch-size", 4) == 0
  assert engine.batches == before * 2
  written = [p for p in times if p.stat().st_mtime_ns != times[p]]
  assert {p.relative_to(tmp_path).as_posix() for p in written} <= {
      "traces/00000/1.json", "round2/00000/samples/00001.png", "round1/00001/samples/00002.png",
      "round2/00001/samples/00002.png"}
  assert generate("geneval", tmp_path, "--limit", 2, "--batch-size", 4) == 0
  assert len(engine.batches) == 4  # all was there


class Killed(BaseException):
  pass


@pytest.mark.parametrize("benchmark", ["oneig", "geneval"])
def test_a_kill_at_any_file_leaves_nothing_torn_and_is_made_good(
    benchmark, engine, generate, tmp_path, monkeypatch):
  asked, draw = [], runner.generate_images
  monkeypatch.setattr(runner, "generate_images", lambda request: asked.append(request) or draw(request))
  monkeypatch.setattr(os, "fsync", lambda _: None)  # for power cuts, and slow
  assert generate(benchmark, tmp_path / "whole", "--limit", 1, "--batch-size", 3,
                  "--rounds", 2 if benchmark == "oneig" else 1) == 0
  want, place, made = tree(tmp_path / "whole"), os.replace, []
  written, left = storage.write_bytes, [0]

  def torn(path, data, folder=None):
    left[0] -= 1
    if left[0] == 0:
      (folder / "half" if folder else path).write_bytes(data[:len(data) // 2])
      raise Killed
    written(path, data, folder)

  def unplaced(source, destination):
    left[0] -= 1
    if left[0] == 0:
      raise Killed
    made.append(destination)
    place(source, destination)

  monkeypatch.setattr(storage, "write_bytes", torn)
  monkeypatch.setattr(os, "replace", unplaced)
  for last in range(1, 2 * len(want) + 40):
    out = tmp_path / str(last)
    left[0], made[:] = last, []
    request = dataclasses.replace(asked[0], out=out)
    try:
      draw(request)
    except Killed:
      for path, content in tree_of_whole(out).items():
        assert path not in want or want[path] == content
      left[0] = 0
      draw(request)
    assert tree(out) == want
    traces = [p for p in made if "traces" in p.parts]
    assert len(traces) == len(set(traces))  # no image was finished twice
    if left[0] > 0:  # it came to its end before it could be killed
      break
    shutil.rmtree(out)
  assert last > len(want)


def tree_of_whole(out):
  """`tree`, of what stands in its place."""
  shutil.copytree(out, out.with_name("seen"), ignore=shutil.ignore_patterns(".aside"))
  found = tree(out.with_name("seen"))
  shutil.rmtree(out.with_name("seen"))
  return found


@pytest.mark.parametrize("argv, message", [
    (["--rounds", "1"], "generation.rounds=2, not 1"),
    (["--steps", "9"], "generation.steps=10, not 9"),
    (["--config.later.text_scale=3.0"], "generation.later.text_scale=4.0, not 3.0"),
    (["--dtype", "bfloat16"], "dtype=None, not bfloat16"),
])
def test_a_run_goes_on_with_its_own_settings_only(argv, message, engine, generate, tmp_path,
                                                  capsys):
  assert generate("wise", tmp_path, "--limit", 1) == 0
  before = tree(tmp_path)
  assert generate("wise", tmp_path, *argv) == 2
  assert message in capsys.readouterr().err
  assert tree(tmp_path) == before and len(engine.batches) == 1


def test_other_prompts_weights_or_a_folder_of_something_else_are_refused(
    engine, generate, tmp_path, files, checkpoint, capsys, monkeypatch):
  assert generate("wise", tmp_path / "a", "--limit", 1) == 0
  assert generate("genai_bench", tmp_path / "a") == 2
  assert "benchmark=wise, not genai_bench" in capsys.readouterr().err
  other = json.loads(files["wise"].read_text())
  other[2]["Prompt"] = "another"
  (tmp_path / "w.json").write_text(json.dumps(other))
  assert generate("wise", tmp_path / "a", "--prompts", tmp_path / "w.json") == 2
  assert "prompts.sha256=" in capsys.readouterr().err
  config = str(ROOT / "configs" / "tiny.py")
  assert commands.main(["init", "--config", config, "--out", str(tmp_path / "weights"), "--seed", "1",
                   "--config.model.llm.num_layers=1"]) == 0
  assert generate("wise", tmp_path / "a", "--checkpoint", tmp_path / "weights") == 2
  assert "checkpoint=" in capsys.readouterr().err
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "thesis.tex").touch()
  assert generate("wise", tmp_path / "b") == 2
  assert "holds thesis.tex, but no run.json" in capsys.readouterr().err
  copy = tmp_path / "copy"
  shutil.copytree(checkpoint, copy)
  assert generate("wise", tmp_path / "a", "--checkpoint", copy, "--limit", 1) == 0  # the same


def test_a_second_process_of_the_same_number_is_refused(engine, generate, tmp_path, capsys):
  settings = {"a": 1}
  with runner.open_run(tmp_path, settings, {}, "0-of-1"):
    with pytest.raises(ValueError, match="another process with the same --process-id"):
      with runner.open_run(tmp_path, settings, {}, "0-of-1"):
        pass
    with runner.open_run(tmp_path, settings, {}, "1-of-2"):
      pass
  with runner.open_run(tmp_path, settings, {}, "0-of-1"):
    pass


@pytest.mark.parametrize("benchmark, argv, message", [
    ("wise", ["--tasks", "MAGIC"], "--tasks MAGIC: no such task; there are CULTURE, TIME, CHEM"),
    ("genai_bench", ["--tasks", "counting"], "with genai_skills.json beside the prompts"),
    ("wise", ["--process-id", "2", "--num-processes", "2"], "--process-id 2: must be from 0 to 1"),
    ("wise", ["--config.max_prompt_tokens=3"], "wise 1: the prompt has 8 tokens, more than the 3"),
    ("wise", ["--size", "40"], "40 is not a positive multiple of 16"),
    ("wise", ["--checkpoint", "nowhere"], "--checkpoint nowhere: no such folder"),
    ("geneval", ["--prompts", "nowhere"], "--prompts nowhere: no such file"),
])
def test_what_cannot_work_is_said_before_anything_is_made(benchmark, argv, message, generate,
                                                          tmp_path, capsys):
  assert generate(benchmark, tmp_path / "out", *argv) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_prompt_as_long_as_a_book_is_refused_with_its_item(checkpoint, files, tmp_path, capsys):
  rows = json.loads(files["wise"].read_text())
  rows[1]["Prompt"] = "word " * 500_000
  path = tmp_path / "book.json"
  path.write_text(json.dumps(rows))
  assert commands.main(["eval", "generate", "wise", "--out", str(tmp_path / "out"), "--subset", *TINY,
                        "--checkpoint", str(checkpoint), "--prompts", str(path)]) == 2
  assert "wise 1: the text has" in capsys.readouterr().err


def test_an_incomplete_file_is_refused_unless_it_is_meant(generate, tmp_path, capsys):
  assert generate("wise", tmp_path / "out", subset=False) == 2
  error = capsys.readouterr().err
  assert "1 prompts of CULTURE, but wise as published has 400" in error and "--subset" in error


def test_help_shows_the_paper_s_setting_and_it_is_the_default(capsys, engine, generate, tmp_path,
                                                              monkeypatch):
  with pytest.raises(SystemExit):
    commands.main(["eval", "generate", "--help"])
  text = capsys.readouterr().out
  for benchmark in eval_verb.benchmarks():
    assert f"irg eval generate {benchmark} " in text
  asked = []
  monkeypatch.setattr(runner, "generate_images",
                      lambda request: asked.append(request) or runner.Result(0, 0, []))
  shown = text.split("which is the same as ")[1].split("\n\n")[0].replace("\\\n", " ")
  argv = [part.replace('"', "") for part in shown.replace(", ", ",").split()]
  base = ["eval", "generate", "geneval", "--out", "x", "--checkpoint", str(tmp_path)]
  assert commands.main(base) == 0 and commands.main([*base, *argv]) == 0
  assert asked[0].settings == asked[1].settings
  s = asked[0].settings
  assert (s.rounds, s.width, s.steps, s.think_limit, s.later.image_scale) == (2, 1024, 50, 4096, 2)


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
import test_eval_generate as here
draw = here.Engine()
here.irg.generate = lambda *args, **kwargs: (time.sleep(0.02), draw(*args, **kwargs))[1]
here.generator.load_model = lambda *_: (None, None)
sys.exit(here.commands.main({argv!r}))
"""


def start(checkpoint, out, limit):
  """A process that draws four images of each of `limit` prompts with the stand-in."""
  argv = ["eval", "generate", "geneval", "--checkpoint", str(checkpoint), "--out", str(out), *TINY,
          "--limit", str(limit), "--batch-size", "2"]
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  code = WORKER.format(tests=str(ROOT / "tests"), argv=argv)
  return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("kills, limit", [(2, 7), pytest.param(10, 40, marks=pytest.mark.long)])
def test_kill_9_and_resume_gives_the_bytes_of_a_run_that_was_not_stopped(
    checkpoint, engine, generate, tmp_path, kills, limit):
  whole, out, rng = tmp_path / "whole", tmp_path / "killed", np.random.default_rng()
  count = lambda: len(list(out.glob("traces/*/*.json")))
  for _ in range(kills):
    process, enough = start(checkpoint, out, limit), count() + rng.integers(1, 9)
    while count() < enough:
      assert process.poll() is None, process.communicate()[0]
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
  assert generate("geneval", whole, "--limit", limit, "--batch-size", 2) == 0
  want, half = tree(whole), tree_of_whole(out)
  assert len(want) == limit * (4 * 3 + 2)
  assert len(half) < len(want) and half.items() <= want.items()
  assert generate("geneval", out, "--limit", limit, "--batch-size", 2) == 0
  assert tree(out) == want


def test_for_real_a_image_is_the_same_bytes_in_another_order(checkpoint, generate, tmp_path,
                                                              monkeypatch):
  shared = Progress(stream=io.StringIO())  # compiled code belongs to the display it reports to
  monkeypatch.setattr(runner, "Progress", lambda: shared)
  real = ["--rounds", 1, "--no-think", "--steps", 3, "--batch-size", 2]
  assert generate("wise", tmp_path / "whole", *real) == 0
  want = tree(tmp_path / "whole")
  assert len(want) == 3 * 2
  for tasks in (["TIME", "CHEMISTRY"], ["CULTURE", "CHEMISTRY"]):
    assert generate("wise", tmp_path / "order", *real, "--tasks", *tasks) == 0
  assert tree(tmp_path / "order") == want
