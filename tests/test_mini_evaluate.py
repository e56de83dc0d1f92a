"""The mini world's benchmark and report: constant prompts, layout, scores, figures, tables, page.

All tests but the last use painted images and written thoughts, not a model.
"""

import dataclasses
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from irg_jax import commands, sharding, storage, weights
from irg_jax.evaluate import base
from irg_jax.evaluate import generate as runner
from irg_jax.evaluate import score
from irg_jax.commands.generate import make_inputs
from irg_jax.generate import generator
from irg_jax.generate.settings import Defaults, Settings, write_defaults
from irg_jax.mini import benchmark, figures, report, scenes, thoughts, vae, verifier, world
from irg_jax.mini import run as mini_run
from irg_jax.mini.scenes import paint
from irg_jax.reports import plots
from mini_records import records_of_test

pytestmark = pytest.mark.usefixtures("on_one_device")
ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = [item.extra for item in benchmark.MINI.read()]


def test_the_test_s_file_is_what_the_tasks_give_and_shares_no_prompt_with_training():
  rng = np.random.default_rng([0, 4])
  want = records_of_test(168, rng, unseen=False) + records_of_test(96, rng, unseen=True)
  assert RECORDS == json.loads(json.dumps(want))
  assert all(world.is_for_test(r) for r in RECORDS)
  assert [world.is_unseen(r) for r in RECORDS] == [r["split"] == "unseen" for r in RECORDS]
  assert {r["tag"] for r in RECORDS} == set(world.WORLD1.tasks)
  benchmark.MINI.check_counts(benchmark.MINI.read())


@pytest.mark.parametrize("changed, message", [
    ({"split": "new"}, "unknown split 'new'"), ({"tag": "style"}, "unknown tag 'style'"),
    ({"include": []}, "'include' is empty")])
def test_a_broken_record_is_named(tmp_path, changed, message):
  (tmp_path / "test.jsonl").write_text(json.dumps(RECORDS[0] | changed))
  with pytest.raises(ValueError, match=f"test.jsonl, line 1: {message}"):
    benchmark.MINI.read(tmp_path)


# A hand-made arm: what each of its images is, round by round, right (1) or wrong (0).

PATTERNS = {(0, 0): (0, 1), (0, 1): (1, 1), (1, 0): (0, 0), (1, 1): (1, 0), (2, 0): (0, 1),
            (2, 1): (0, 1), (200, 0): (1, 1), (200, 1): (0, 1)}


def scene_of(record, right, rng):
  """A scene for a record, or one that lacks a thing of it."""
  scene = scenes.sample_scene(record, rng)
  return scene if right else dataclasses.replace(scene, things=scene.things[1:])


def scored(folder):
  report.score_new(folder)
  return json.loads((folder / score.SCORES).read_text())


def write_arm(folder, patterns, say=lambda verdict, place: verdict.faults):
  """Images, traces and scores as `report.evaluate` leaves them."""
  items, rng = benchmark.MINI.read(), np.random.default_rng(0)
  for (i, image), rights in patterns.items():
    item, rounds, verdict = items[i], [], None
    for number, right in enumerate(rights, 1):
      scene = scene_of(item.extra, right, rng)
      path = benchmark.MINI.image_path(item, image, number)
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(paint(scene)).save(folder / path)
      think = thoughts.plan(item.extra, scene)
      if verdict is not None:
        said = dataclasses.replace(verdict, faults=say(verdict, (i, image)))
        think = thoughts.reflect(item.extra, said, scene, rounds[-1]["think"])
      verdict = verifier.score(paint(scene), item.extra)
      assert verdict.correct == right
      rounds.append({"think": think, "picture": str(path), "seconds": {"draw": 2.0, "think": 1.0}})
    trace = folder / base.trace_path(item, image)
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text(json.dumps({"prompt": item.prompt, "seed": 7, "rounds": rounds}))
  return scored(folder)


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("arm") / "irg"
  # What the reflections say is true, but for three of them.
  wrong = {(0, 0): (), (0, 1): ("one red star is missing",), (2, 0): ("one ring is too many",)}
  scores = write_arm(folder, PATTERNS, lambda verdict, place: wrong.get(place, verdict.faults))
  return folder, scores


def test_scores_are_genevals_by_split_and_what_is_missing_is_counted(arm):
  folder, scores = arm
  first, second = scores["rounds"]["1"], scores["rounds"]["2"]
  tag = lambda i: RECORDS[i]["tag"]
  assert len({tag(i) for i in (0, 1, 2)}) == 3
  assert first["pictures"] == 8 and first["missing"] == 4 * 264 - 8 and not first["complete"]
  assert {t: s["score"] for t, s in first["splits"]["seen"]["tasks"].items()} == {
      tag(0): 0.5, tag(1): 0.5, tag(2): 0.0}
  assert first["splits"]["seen"]["overall"] == pytest.approx(1 / 3)
  assert first["splits"]["unseen"]["overall"] == 0.5
  assert second["splits"]["seen"]["overall"] == pytest.approx(2 / 3)
  assert second["splits"]["unseen"]["overall"] == 1.0
  lines = [json.loads(x) for x in (folder / score.ITEMS).read_text().splitlines()]
  assert len(lines) == 16 and lines[0]["tasks"] == [tag(0), "seen"]
  for line in lines:
    assert ("missing" in line["words"]) == (line["scores"]["correct"] == 0)


def test_a_file_that_is_no_image_of_the_world_has_no_score(tmp_path):
  write_arm(tmp_path, {(0, 0): (1,), (0, 1): (1,)})
  item = benchmark.MINI.read()[0]
  Image.new("RGB", (32, 32)).save(tmp_path / benchmark.MINI.image_path(item, 0, 1))
  (tmp_path / score.SCORES).unlink()
  got = scored(tmp_path)["rounds"]["1"]
  assert got["unscored"]["by_reason"] == {"not an image of the mini world": 1}
  assert got["pictures"] == 1


def test_images_are_scored_anew_only_if_they_or_the_verifier_are_new(tmp_path, monkeypatch):
  write_arm(tmp_path, {(0, 0): (1,)})
  asked = []
  add = benchmark.Verified.add
  monkeypatch.setattr(benchmark.Verified, "add", lambda *a: asked.append(a[2].name) or add(*a))
  report.score_new(tmp_path)
  assert asked == []
  source = tmp_path / benchmark.MINI.image_path(benchmark.MINI.read()[0], 0, 1)
  source.with_name("00001.png").write_bytes(source.read_bytes())
  report.score_new(tmp_path)
  assert asked == ["00000.png", "00001.png"]
  monkeypatch.setattr(benchmark, "protocol", lambda: {"verifier": "another"})
  report.score_new(tmp_path)
  assert len(asked) == 4


def test_changes_between_rounds_are_counted_against_what_could_change(arm):
  got = figures.arm_figures(benchmark.read(arm[0]))["rounds"]["2"]
  assert got["changes"]["right_to_wrong"] == {"count": 1, "of": 3, "share": pytest.approx(1 / 3)}
  assert got["changes"]["wrong_to_right"] == {"count": 4, "of": 5, "share": pytest.approx(0.8)}


def test_a_reflection_is_held_against_what_the_verifier_sees(arm):
  got = figures.arm_figures(benchmark.read(arm[0]))["rounds"]
  talk = got["2"]["reflections"]
  count = {name: (value["count"], value["of"]) for name, value in talk.items()}
  assert count == {"readable": (8, 8), "faults_named": (5, 8), "wrong_faults_named": (3, 5),
                   "wrong_noticed": (4, 5), "right_doubted": (1, 3), "seen_rightly": (8, 8)}
  assert (got["1"]["plan_drawn"]["count"], got["2"]["plan_drawn"]["count"]) == (8, 8)
  assert got["1"]["seconds"] == 3.0 and got["1"]["missing"] == 0


def test_gibberish_names_no_fault(tmp_path):
  write_arm(tmp_path, {(0, 0): (0, 0)})
  trace = next((tmp_path / "traces").rglob("*.json"))
  content = json.loads(trace.read_text())
  content["rounds"][1]["think"] = "<think> blue blue </think>"
  trace.write_text(json.dumps(content))
  talk = figures.reflections(benchmark.read(tmp_path), 2)
  assert {v["count"] for v in talk.values()} == {0} and talk["right_doubted"]["share"] is None


def test_an_interval_is_around_the_mean_over_tasks_and_narrows_with_prompts():
  rng = np.random.default_rng(1)
  tags = np.array(["a"] * 30 + ["b"] * 10 + ["c"] * 5)
  values = rng.integers(0, 5, 45) / 4
  values[3] = np.nan
  got = figures.interval(values, tags)
  means = [np.nanmean(values[tags == t]) for t in "abc"]
  assert got["value"] == pytest.approx(np.mean(means)) and got["prompts"] == 44
  assert got["low"] < got["value"] < got["high"]
  spread = np.sqrt(sum(np.nanvar(values[tags == t]) / (~np.isnan(values[tags == t])).sum()
                       for t in "abc")) / 3
  assert got["high"] - got["low"] == pytest.approx(2 * 1.96 * spread, rel=0.1)
  more = figures.interval(np.tile(values, 9), np.tile(tags, 9))
  assert more["high"] - more["low"] < 0.4 * (got["high"] - got["low"])
  assert figures.interval(values, tags) == got
  assert figures.interval(np.full(3, np.nan), tags[:3]) is None


def test_a_paired_difference_is_sure_where_each_prompt_improves_alike():
  items = benchmark.MINI.read()
  before = np.random.default_rng(0).integers(0, 4, len(items)) / 4
  got = figures.difference([*(before + 0.25)[:-1], None], before, items)
  for split, count in (("all", 263), ("seen", 168), ("unseen", 95)):
    assert got[split] == {"value": 0.25, "low": 0.25, "high": 0.25, "prompts": count}


@pytest.fixture(scope="module")
def run_folder(arm, tmp_path_factory):
  """A run with two arms, and its report."""
  out = tmp_path_factory.mktemp("run")
  write_arm(out / "evaluation" / "base", {k: v[:1] for k, v in PATTERNS.items()})
  (out / "evaluation" / "irg").symlink_to(arm[0])
  assert report.make(out) == out / "report" / "index.html"
  return out


def test_report_markdown_and_page_say_the_same(run_folder):
  folder = run_folder / "report"
  got = json.loads((folder / "report.json").read_text())
  text, page = (folder / "report.md").read_text(), (folder / "index.html").read_text()
  assert list(got["arms"]) == ["base", "irg", "best_of_two"]
  assert list(got["arms"]["irg"]["rounds"]) == ["1", "2"]
  for name, overall in (("base, thinking", "0.333"), ("stage 2, round 2", "0.667")):
    cell = re.search(rf"\| {name} \| ({overall} \[[^|]*\]) \|", text)[1]
    assert cell in page
  assert "| stage 2: round 2 less round 1 | 0.333 [" in text
  assert got["differences"]["stage 2, round 1, less base, thinking"]["all"]["value"] == 0
  assert "| right pictures made wrong | 0.333 (1 of 3) |" in text


def test_the_page_holds_everything_and_shows_each_kind_of_trace(run_folder):
  page = (run_folder / "report" / "index.html").read_text()
  assert not re.findall(r'(?:src|href)="(?!data:)', page)
  kinds = re.findall(r'<p class="label">([^·]+) ·', page)
  assert [kinds.count(kind) for kind, *_ in benchmark.KINDS] == [4, 2, 1, 1]
  assert page.count('alt="image ') == 16 and "<b>What falls short:</b> nothing." in page
  for name in ("scores.png", "tasks.png", "choices.png"):
    with Image.open(run_folder / "report" / name) as image:
      assert image.size[0] > 1000


def test_the_run_s_checkpoint_gets_its_figures_and_a_card_that_says_what_made_it(run_folder):
  (run_folder / "checkpoint").mkdir()
  (run_folder / "checkpoint" / "llm_config.json").write_text("{}")
  before = weights.fingerprint(run_folder / "checkpoint")
  settings = mini_run.load(ROOT / "configs" / "mini.py", ["seed=7", "base_rows=12345"])
  report.make(run_folder, settings=dataclasses.asdict(settings))
  assert weights.fingerprint(run_folder / "checkpoint") == before  # its test can still be gone on with
  scores, made = (run_folder / "checkpoint" / "scores.json", run_folder / "report" / "report.json")
  assert scores.read_text() == made.read_text()
  card = (run_folder / "checkpoint" / "README.md").read_text()
  assert "with seed 7" in card and "12345 rows" in card and "| stage 2, round 2 | 0.667 [" in card


def test_traces_are_chosen_a_task_in_turn(arm):
  chosen = benchmark.choose(benchmark.read(arm[0]))
  first = [e["tasks"] for e in chosen if e["kind"] == "wrong, then right"]
  assert first[:3] == [[RECORDS[i]["tag"], RECORDS[i]["split"]] for i in (0, 2, 200)]


def test_a_bar_is_as_high_as_its_value():
  full = {"value": 1.0, "low": 1.0, "high": 1.0}
  half = {"value": 0.5, "low": 0.5, "high": 0.5}
  image = np.asarray(Image.open(io.BytesIO(plots.bar_chart("t", ["a", "b"], [
      ("x", [full, half]), ("y", [None, None])]))).convert("RGB"))[110:]  # below the legend
  color = np.array([int(plots.COLORS[-2][i:i + 2], 16) for i in (1, 3, 5)])
  heights = (image == color).all(-1).sum(0)
  left, right = heights[:heights.size // 2].max(), heights[heights.size // 2:].max()
  assert left > 400 and abs(right / left - 0.5) < 0.02


def test_eval_score_and_report_show_the_mini_world_as_one_more_table(arm, tmp_path, capsys):
  assert commands.main(["eval", "score", "mini", "--out", str(arm[0])]) == 0
  assert "round 2: Mini world 0.750 (8 scored, 1048 not there" in capsys.readouterr().out
  assert commands.main(["eval", "report", str(arm[0]), "--to", str(tmp_path)]) == 0
  got = json.loads((tmp_path / "report.json").read_text())
  assert got["columns"][-1] == "Mini world" and got["rows"][0]["values"].get("Mini world") is None
  rows = got["categories"]["mini"]["rows"]
  assert rows["overall, seen"]["this run, round 2"] == pytest.approx(2 / 3)
  assert rows["overall, unseen"]["this run, round 1"] == 0.5
  page = (tmp_path / "pages" / "mini-001.html").read_text()
  assert page.count('<div class="pair">') == 8 and "is missing" in page
  # A plan has one grid, a reflection two.
  assert page.count("<summary>thought</summary>") == 16 and page.count('class="cells"') == 24
  assert page.count('<img class="tiny"') == 16


# Without a run, the package's checkpoint.

def test_without_run_and_checkpoint_the_report_says_what_to_do(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(storage, "SHIPPED", tmp_path / "none")
  assert commands.main(["mini", "report", "--out", str(tmp_path / "out")]) == 2
  assert "make a run first" in capsys.readouterr().err
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mini.json").write_text("{}")
  assert commands.main(["mini", "report", "--out", str(tmp_path / "out")]) == 2
  assert "is not finished; go on with irg mini run" in capsys.readouterr().err
  assert commands.main(["generate", "a red circle"]) == 2
  assert "--checkpoint: give the folder of your weights" in capsys.readouterr().err


def test_the_package_s_checkpoint_is_measured_and_the_other_rows_say_where_they_are_from(
    run_folder, arm, tmp_path, monkeypatch):
  shipped = tmp_path / "checkpoint"
  shipped.mkdir()
  (shipped / "scores.json").write_text((run_folder / "report" / "report.json").read_text())
  monkeypatch.setattr(storage, "SHIPPED", shipped)
  asked = []

  def draw(arm_, checkpoint, folder, *_):
    asked.append((arm_.name, checkpoint))
    write_arm(folder, PATTERNS)

  monkeypatch.setattr(report, "draw", draw)
  monkeypatch.setattr(vae, "measure", lambda *args: None)
  report.run(tmp_path / "out")
  assert asked == [("irg", shipped)]
  got = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
  assert {n: a["measured"] for n, a in got["arms"].items()} == {
      "base": report.ELSEWHERE, "irg": report.HERE, "best_of_two": report.HERE}
  assert "Measured in the run that made the checkpoint: base, thinking." in (
      tmp_path / "out" / "report" / "report.md").read_text()
  assert got["differences"]["stage 2, round 2, less base, thinking"]["seen"]["prompts"] == 3


# Settings that come with a checkpoint, and the whole way with a model.

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """The mini world's model, smaller, with random weights and short thoughts."""
  folder = tmp_path_factory.mktemp("weights") / "mini"
  argv = ["--config", str(ROOT / "configs" / "mini.py"), "--out", str(folder)]
  small = ("llm.num_layers=1", "llm.hidden_size=48", "llm.mlp_size=64", "vit.num_layers=1",
           "vae.ch=32", "vae.ch_mult=(1, 1, 1, 1)")
  assert commands.main(["init", *argv, *(f"--config.model.{s}" for s in small)]) == 0
  settings = mini_run.load(ROOT / "configs" / "mini.py", [
      "generate.steps=2", "generate.think_limit=8"]).generate
  write_defaults(folder, Defaults(settings=settings, system_prompt=thoughts.SYSTEM_PROMPT))
  return folder, settings


def test_a_checkpoint_s_own_settings_are_the_defaults_and_flags_win(checkpoint, monkeypatch):
  folder, settings = checkpoint
  asked = []
  monkeypatch.setattr(runner, "generate_images",
                      lambda r: asked.append(r) or runner.Result(0, 0, []))
  base = ["eval", "generate", "mini", "--out", "x", "--checkpoint"]
  assert commands.main([*base, str(folder)]) == 0
  assert commands.main([*base, str(folder), "--rounds", "3", "--tasks", "unseen"]) == 0
  assert commands.main([*base, str(folder.parent)]) == 0  # has no generate.json
  assert asked[0].settings == settings and asked[0].system_prompt == thoughts.SYSTEM_PROMPT
  assert asked[1].settings == dataclasses.replace(settings, rounds=3)
  assert len(asked[1].selected) == 96 and len(asked[0].selected) == 264
  assert asked[2].settings == Settings(think_limit=4096)


def test_a_checkpoint_says_what_it_is_computed_in_and_the_flag_wins(checkpoint, tmp_path):
  half, mesh = tmp_path / "half", sharding.make_mesh(None)
  weights.convert(checkpoint[0], half, to="published", dtype="bfloat16")
  dtype = lambda asked=None: generator.load_model(half, mesh, asked, print)[0].config.dtype
  assert dtype() == "bfloat16"
  write_defaults(half, Defaults(settings=checkpoint[1], system_prompt=thoughts.SYSTEM_PROMPT,
                                dtype="float32"))
  assert dtype() == "float32" and dtype("bfloat16") == "bfloat16"


def test_irg_generate_takes_them_too_and_the_package_s_checkpoint_where_none_is_named(
    checkpoint, monkeypatch, tmp_path):
  folder, settings = checkpoint
  monkeypatch.setattr(storage, "SHIPPED", folder)
  args = commands.make_parser().parse_args(["generate", "a red circle"])
  asked = make_inputs(args, [])
  assert asked.checkpoint == folder and asked.settings == settings
  assert asked.system_prompt == thoughts.SYSTEM_PROMPT
  args = commands.make_parser().parse_args(["generate", "a", "--checkpoint", str(tmp_path)])
  assert make_inputs(args, []).settings == Settings()


def test_a_model_s_images_are_drawn_once_and_scored(checkpoint, tmp_path):
  items = benchmark.select(seen=1, unseen=1, images=1)
  arms = [report.ARMS[0], dataclasses.replace(report.FINAL, rounds=2)]
  report.evaluate(tmp_path, items, 2, arms, checkpoint[0])
  for arm_, rounds in zip(arms, (1, 2)):
    folder = tmp_path / "evaluation" / arm_.name
    scores = json.loads((folder / "scores.json").read_text())
    assert sorted(scores["rounds"]) == ["1", "2"][:rounds]
    assert scores["rounds"]["1"]["pictures"] == 2
    assert scores["run"]["settings"]["system_prompt"] == (
        thoughts.SYSTEM_PROMPT if arm_.think else "")
    assert json.loads((folder / "cost.json").read_text())["peak_bytes"] > 2**20
  files = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")
                   if p.suffix == ".png" or p.name == score.SCORES}
  before = files()
  assert len(before) == 2 + 2 * 2 + 2
  report.evaluate(tmp_path, items, 2, arms, checkpoint[0])
  assert files() == before
  page = report.make(tmp_path)
  assert "stage 2, round 2" in page.read_text()
  alone = json.loads((tmp_path / "report" / "report.json").read_text())["autoencoder"]
  assert alone == {"right": 0, "pictures": 4}  # of random weights
  assert "keeps 0 right (0.000)" in page.read_text()
