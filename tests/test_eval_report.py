"""`irg eval score` and `irg eval report`, from the command line to the pages."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from irg_jax import commands
from irg_jax import evaluate
from irg_jax.evaluate import base
from irg_jax.evaluate import clauses
from irg_jax.evaluate import genai_bench
from irg_jax.evaluate import geneval as geneval_lib
from irg_jax.evaluate import oneig
from irg_jax.evaluate import report
from irg_jax.evaluate import score
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise
from irg_jax.mini import benchmark as mini


def draw(out, benchmark, items, rounds=(1, 2)):
  for item in items:
    for number in rounds:
      for image in range(item.images):
        path = out / evaluate.get(benchmark).image_path(item, image, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(path)


def geneval(root, right):
  """A scored GenEval run of two prompts; `right(round, image)` are found."""
  out, items = root / "geneval", evaluate.get("geneval").read()[:2]
  draw(out, "geneval", items)
  lines = []
  for item in items:
    name = item.extra["include"][0]["class"]
    for number in (1, 2):
      for image in range(4):
        score_of = 0.9 if right(number, image) else 0.1
        lines.append({"filename": str(geneval_lib.GENEVAL.image_path(item, image, number)),
                      "detections": {name: [{"box": [0, 0, 4, 4], "score": score_of}]}})
  path = out / base.trace_path(items[0], 3)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({"rounds": [{"think": think, "picture": None, "seconds": {}}
                                         for think in ("a <plan>", None)]}))
  boxes = root / "boxes.jsonl"
  boxes.write_text("\n".join(map(json.dumps, lines)))
  assert commands.main(["eval", "score", "geneval", "--out", str(out), "--detections", str(boxes)]) == 0
  return out


def genai(root):
  """A scored GenAI-Bench run of two prompts with tags, one of them never drawn."""
  folder, out = root / "prompts", root / "genai_bench"
  folder.mkdir()
  records = {f"{i:05}": {"id": f"{i:05}", "prompt": f"<b>&{i}", "models": {}} for i in (1, 2)}
  (folder / "genai_image.json").write_text(json.dumps(records))
  tags = (*genai_bench.BASIC, *genai_bench.ADVANCED)
  (folder / "genai_skills.json").write_text(json.dumps({tag: [1, 2] for tag in tags}))
  items = evaluate.get("genai_bench").read(folder)
  draw(out, "genai_bench", items[:1])
  measured = root / "vqa.jsonl"
  measured.write_text("\n".join(json.dumps({"round": n, "part": "vqascore", "id": "00001",
                                            "values": [n / 4]}) for n in (1, 2)))
  assert commands.main(["eval", "score", "genai_bench", "--out", str(out), "--prompts", str(folder),
                   "--measurements", str(measured)]) == 0
  return out


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  root = tmp_path_factory.mktemp("report")
  outs = [genai(root), geneval(root, lambda number, image: image < number)]
  assert commands.main(["eval", "report", *map(str, outs), "--to", str(root / "report")]) == 0
  return root


def test_a_row_a_round_stands_below_the_published_rows(built):
  got = json.loads((built / "report/report.json").read_text())
  names = [row["name"] for row in got["rows"]]
  assert names == [*base.PUBLISHED, "this run, round 1", "this run, round 2"]
  assert [row["values"] for row in got["rows"][-2:]] == [
      {"GenEval": 0.25, "GenAI-Bench": 0.25}, {"GenEval": 0.5, "GenAI-Bench": 0.5}]
  assert got["rows"][-1]["partial"] == ["GenEval", "GenAI-Bench"]
  assert got["categories"]["geneval"]["rows"]["single_object"] == {
      "this run, round 1": 0.25, "this run, round 2": 0.5}
  assert [(c["benchmark"], c["round"], c["scored"], c["missing"]) for c in got["coverage"]] == [
      ("GenEval", 1, 8, 2204), ("GenEval", 2, 8, 2204), ("GenAI-Bench", 1, 1, 1),
      ("GenAI-Bench", 2, 1, 1)]


def test_markdown_and_page_show_the_same_figures_as_the_json(built):
  got = json.loads((built / "report/report.json").read_text())
  text = (built / "report/report.md").read_text()
  page = (built / "report/report.html").read_text()
  for row in got["rows"]:
    line = next(x for x in text.splitlines() if x.startswith(f"| {row['name']} |"))
    cells = [c.strip().replace("\\*", "*") for c in line.strip("|").split("|")]
    assert cells[1:] == [report.show(row["values"].get(c), c) + "*" * (c in row["partial"])
                         for c in got["columns"]]
    shown = re.search(rf"<th>{re.escape(row['name'])}</th>(.*?)</tr>", page)[1]
    assert re.findall(r">([^<>]+)</td>", shown) == cells[1:]
  for caveat in got["caveats"]:
    assert caveat in text


def test_a_page_shows_a_prompts_rounds_side_by_side_with_seed_and_words(built):
  folder = built / "report/pages"
  assert sorted(p.name for p in folder.iterdir()) == ["genai_bench-001.html", "geneval-001.html"]
  page = (folder / "geneval-001.html").read_text()
  pairs = page.split('<div class="pair">')[1:]
  assert len(pairs) == 8
  for pair in pairs:
    images = re.findall(r'src="([^"]+)"', pair)
    assert [re.search(r"/(round\d)/", i)[1] for i in images] == ["round1", "round2"]
    assert all((folder / i).is_file() for i in images)
  assert "correct 1" in pairs[0] and "expected" in pairs[3] and "found 0" in pairs[3]
  assert f"seed {base.seed('geneval', '00000', 3)}" in page
  assert ["a &lt;plan&gt;" in pair for pair in pairs] == [False] * 3 + [True] + [False] * 4
  assert page.count("<summary>thought</summary>") == 1  # of an image with a trace and a thought
  assert "&lt;b&gt;&amp;1" in (folder / "genai_bench-001.html").read_text()


def test_pages_of_a_longer_report_go_away(built):
  old = built / "report/pages/geneval-002.html"
  old.write_text("old")
  (built / "report/pages/geneval-notes.html").write_text("mine")
  report.write(report.load([built / "geneval"]), built / "report")
  assert not old.exists() and (built / "report/pages/geneval-notes.html").exists()


def test_scoring_again_gives_the_same_files(built):
  out = built / "geneval"
  before = [(out / n).read_bytes() for n in (score.SCORES, score.ITEMS)]
  assert geneval(built, lambda number, image: image < number) == out
  assert [(out / n).read_bytes() for n in (score.SCORES, score.ITEMS)] == before


def test_settings_and_unlike_checkpoints_are_shown(built, tmp_path):
  runs = report.load([built / "geneval", built / "genai_bench"])
  for number, run in enumerate(runs):
    run.scores["run"] = {"settings": {"checkpoint": str(number), "generation": {"steps": 50}},
                         "notes": {"devices": "1 x cpu"}}
  got = report.build(runs)
  assert got["settings"]["geneval"]["generation.steps"] == 50
  assert got["settings"]["geneval"]["devices"] == "1 x cpu"
  assert any("not all runs are of the same checkpoint" in note for note in got["notes"])
  assert "| generation.steps | 50 | 50 |" in report.markdown(got)


def summaries():
  """A summary without a single score, of each benchmark."""
  return {"geneval": clauses.TaskSummary(geneval_lib.TASKS).value(), "wise": wise.Scorer().value(),
          "tiif": tiif.Scorer({}).value(), "oneig": oneig.Scorer(None).value(),
          **{m.name: mini.Verified(m.world).value() for m in mini.MINIS.values()},
          "genai_bench": genai_bench.Scorer({"basic": [1]}).value()}


@pytest.mark.parametrize("benchmark", evaluate.BENCHMARKS)
def test_a_run_without_a_score_has_dashes_not_numbers(tmp_path, benchmark):
  summary = {"unscored": {"total": 0, "by_reason": {}, "examples": []}} | summaries()[benchmark]
  scores = {"benchmark": benchmark, "prompts": 1, "run": {},
            "rounds": {"1": summary | {"missing": 1, "complete": False}}}
  (tmp_path / score.SCORES).write_text(json.dumps(scores))
  (tmp_path / score.ITEMS).write_text("")
  report.write(report.load([tmp_path]), tmp_path / "report")
  line = (tmp_path / "report/report.md").read_text().split("| this run, round 1 |")[1]
  assert set(line.split("\n")[0].replace("|", "").split()) == {"–"}


def test_a_figure_has_the_papers_places():
  assert [report.show(v, "TIIF short") for v in (0.0, 71.0, None)] == ["0.00", "71.00", "–"]
  assert [report.show(v, "GenEval") for v in (0.0, 1.0)] == ["0.000", "1.000"]


def test_every_published_figure_stands_in_a_column_of_the_table():
  got = report.build([])
  assert [row["name"] for row in got["rows"]] == list(base.PUBLISHED)
  for row in got["rows"]:
    assert row["values"] and set(row["values"]) < set(got["columns"])
  mean = lambda row, names: sum(row[n] for n in names) / len(names)
  for row in oneig.ONEIG.published_categories.values():
    assert mean(row, oneig.PARTS) == pytest.approx(row["overall"], abs=5e-4)
  for row in wise.WISE.published_categories.values():
    assert mean(row, wise.RANGES) == pytest.approx(row["plain mean"], abs=5e-3)


@pytest.mark.parametrize("words, message", [
    (["report", "{out}/none"], "irg eval score first"),
    (["report", "{out}/geneval", "{out}/geneval"], "one run of each benchmark"),
    (["score", "wise", "--out", "{out}/geneval", "--prompts", "x"], "x: no such file"),
    (["score", "geneval", "--out", "{out}/none"], "no such folder"),
    (["score", "geneval", "--out", "{out}/prompts"], "no round1"),
    (["score", "geneval", "--out", "{out}/geneval"], "either --detections or --detector"),
    (["score", "geneval", "--out", "{out}/geneval", "--questions", "q"], "--questions is for"),
    (["score", "geneval", "--out", "{out}/geneval", "--tries", "2"], "--tries is for wise, tiif"),
    (["score", "genai_bench", "--out", "{out}/genai_bench", "--prompts", "{out}/prompts",
      "--threshold", "0.5"], "--threshold is for geneval only"),
    (["score", "geneval", "--out", "{out}/geneval", "--detections", "q"], "q: no such file"),
    (["score", "genai_bench", "--out", "{out}/genai_bench", "--prompts", "{out}/prompts"],
     "--judge-url"),
])
def test_a_mistake_is_named_before_anything_is_written(built, capsys, words, message):
  before = sorted(p for p in built.rglob("*") if not p.match("report/**"))
  assert commands.main(["eval", *(w.format(out=built) for w in words)]) == 2
  assert re.search(message, capsys.readouterr().err)
  assert sorted(p for p in built.rglob("*") if not p.match("report/**")) == before


def test_help_has_the_papers_setting_for_every_benchmark(capsys):
  with pytest.raises(SystemExit):
    commands.main(["eval", "score", "--help"])
  text = capsys.readouterr().out
  assert all(f"irg eval score {name} " in text for name in evaluate.BENCHMARKS)
