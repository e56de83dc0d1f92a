"""Every golden case of the five benchmarks: what the official scorers made of made-up inputs.

Cases are found by listing $IRG_BENCH_GOLDEN (default tests/data/golden), never by name: the
first folder says which benchmark, the files in a case say of what kind it is.
"""

import csv
import itertools
import json
import math
import os
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from conftest import ROOT
import official
from irg_jax.evaluate import base
from irg_jax.evaluate import genai_bench
from irg_jax.evaluate import oneig
from irg_jax.evaluate import questions as questions_lib
from irg_jax.evaluate import records as records_lib
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise

GOLDEN = pathlib.Path(os.environ.get("IRG_BENCH_GOLDEN", ROOT / "tests/data/golden"))


def near(value):
  """Equal to 1e-9; null stands for null."""
  return None if value is None else pytest.approx(value, rel=0, abs=1e-9)


def listed(pattern):
  """Files that match, as parameters; one skipped parameter where there is none."""
  found = sorted(GOLDEN.glob(pattern))
  if found:
    return [pytest.param(p, id=str(p.relative_to(GOLDEN))) for p in found]
  reason = f"no {pattern} under {GOLDEN} (set IRG_BENCH_GOLDEN)"
  return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


def read(path):
  return json.loads(path.read_text(encoding="utf-8"))


def lines(path):
  return [record for _, record in records_lib.read_lines(path)]


@pytest.mark.parametrize("path", listed("*/*/expected.json"))
def test_every_case_folder_is_of_a_kind_that_a_test_scores(path):
  benchmark, names = path.parent.parent.name, {p.name for p in path.parent.iterdir()}
  kinds = {
      "geneval": {"results.jsonl"} & names or {"detections.jsonl"} & names,
      "wise": any(n.endswith(".jsonl") for n in names),
      "tiif": "eval_results_files.json" in names,
      "oneig": "stub_model_outputs.json" in names,
      "genai_bench": "vqascores.json" in names,
  }
  assert kinds.get(benchmark)


@pytest.mark.parametrize("path", listed("geneval/*/results.jsonl"))
def test_geneval_summaries(path):
  expected = read(path.parent / "expected.json")
  summary = official.geneval_summary(lines(path))
  assert summary["pictures"] == expected["total_images"]
  assert summary["prompts"] == expected["total_prompts"]
  assert f"{summary['correct_pictures']:.2%}" == expected["pct_correct_images"]
  assert f"{summary['correct_prompts']:.2%}" == expected["pct_correct_prompts"]
  assert list(summary["tasks"]) == [task["tag"] for task in expected["tasks"]]
  for task in expected["tasks"]:
    found = summary["tasks"][task["tag"]]
    assert f"{found['score']:.2%}" == task["pct"]
    assert (found["correct"], found["count"]) == (task["correct"], task["total"])
    assert found["score"] == near(task["accuracy"])
  assert f"{summary['overall']:.5f}" == expected["overall"]
  printed = path.parent / "official_stdout.txt"
  assert official.geneval_text(summary).split() == printed.read_text().split()
  scores = [task["score"] for task in summary["tasks"].values()] + [summary["overall"]]
  row = expected["irg_geneval_results_txt"].splitlines()[1]
  assert " ".join(f"{score:.2f}" for score in scores) == row


@pytest.mark.parametrize("path", listed("geneval/*/detections.jsonl"))
def test_geneval_decisions(path):
  expected = read(path.parent / "expected.json")["results"]
  records = lines(path)
  assert len(records) == len(expected)
  for record, want in zip(records, expected):
    got = official.score_image(record)
    assert got["filename"] == want["filename"]
    assert got["correct"] == want["correct"], want["filename"]
    reasons = got["reason"].split("\n") if got["reason"] else []
    assert list(map(_unordered, reasons)) == list(map(_unordered, want["reason_lines"]))
    assert json.loads(got["details"]) == want["details"]


def _unordered(reason):
  """A reason with the relations that it found as a set: upstream prints them in any order."""
  head, _, found = reason.partition(" target, found ")
  return head, frozenset(found.removesuffix(" target").split(" and ")) if found else None


@pytest.mark.parametrize("path", listed("wise/*/expected.json"))
def test_wise_categories_and_both_overalls(path):
  expected = read(path)
  want = expected.get("official_legacy") or expected["official"]
  verified = "official_legacy" not in expected
  summary = wise.Scorer(**official.WISE_VERIFIED if verified else {})
  files = expected.get("file_order") or sorted(p.name for p in path.parent.glob("*.jsonl"))
  for name in files:
    for number, record in records_lib.read_lines(path.parent / name):
      official.add_wise_record(summary, record, f"{name}:{number}",
                               ("score",) if verified else wise.FIELDS)
  got = summary.value()
  for name, average in want["exact_category_avg"].items():
    assert got["categories"][name]["score"] == near(average)
  for name, of in want["categories"].items():
    assert f"{got['categories'][name]['score']:.2f}" == of["avg_printed"]
    assert got["categories"][name]["count"] == of["n"]
  assert got["unscored"]["total"] == want["warnings"]
  assert got["weighted"] == near(want["exact_overall"])
  if want["overall_printed"]:
    assert f"{got['weighted']:.2f}" == want["overall_printed"]
  if bagel := expected.get("bagel_irg_cal_score"):
    _check_bagel(got, bagel)


def _check_bagel(got, bagel):
  if bagel.get("crashed"):
    assert got["unweighted"] is None
    return
  assert got["unweighted"] == near(bagel["exact_overall_unweighted_mean"])
  assert f"{got['unweighted']:.2f}" == bagel["printed"]["Overall"]
  names = {"CULTURE": "Cultural"} | {n: n.title() for n in list(wise.RANGES)[1:]}
  for name, theirs in names.items():
    score = got["categories"][name]["score"]
    assert score == near(bagel["exact"][theirs])
    assert f"{score:.2f}" == bagel["printed"][theirs]


@pytest.mark.parametrize("path", listed("wise/parse_cases.json"))
def test_wise_parsers(path):
  cases = read(path)
  for case in cases["legacy"]:
    assert wise.parse(case["text"]) == case["official_legacy"], case["text"]
    missing = dict.fromkeys(wise.FIELDS, 9.9)  # how that script marks a score that it lacks
    assert missing | official.parse_bagel(case["text"]) == case["bagel_irg"], case["text"]
  for case in cases["verified"]:
    assert official.parse_verified(case["text"]) == case["scores"], case["text"]


def write_results(path, folder):
  for name, text in read(path).items():
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("path", listed("tiif/*/eval_results_files.json"))
def test_tiif_result_trees(path, tmp_path):
  expected = read(path.parent / "expected.json")
  write_results(path, tmp_path)
  for model, accuracy in expected["accuracy"].items():
    by_round = official.read_tiif_results(tmp_path / model, models=len(expected["accuracy"]))
    assert list(by_round) == [1]
    got = by_round[1]
    check_accuracy(got, accuracy)
    for key, want in expected["total_questions"][model].items():
      assert got["counts"].get(key, {}).get("questions") == want
      assert got["counts"].get(key, {}).get("right") == expected["correct_answers"][model][key]
    check_dimensions(got, model, expected["dimensions"])


@pytest.mark.parametrize("path", listed("tiif/published_counts/*.json"))
def test_tiif_published_counts_give_the_published_groups(path):
  expected = read(path)
  for model, questions in expected["total_questions"].items():
    summary = official.tiif_scorer(len(expected["total_questions"]))
    for key, count in questions.items():
      right = expected["correct_answers"][model][key]
      if count is not None and right is not None:
        summary.count(*key.split("/"), count, right)
    got = summary.value()
    check_accuracy(got, expected["accuracy_rounded4"][model])
    check_dimensions(got, model, expected["dimensions"])


def check_accuracy(got, accuracy):
  for key, want in accuracy.items():
    if key != "Mean_Accuracy":  # by which the official sheet sorts its rows, no more
      assert got["accuracy"].get(key) == near(want), key


def check_dimensions(got, model, dimensions):
  """Compares groups, wholes and overall with the printed figures, to the last digit."""
  ours = got["groups"] | got["wholes"] | {tiif.OVERALL: got["overall"]}
  assert set(dimensions) <= set(ours)
  for name, models in dimensions.items():
    for length, want in models[model].items():
      length = length.removeprefix("overall-")
      assert official.tiif_printed(ours[name][length]) == pytest.approx(float(want), abs=1e-12,
                                                               nan_ok=True), (name, length)


@pytest.mark.parametrize("path", listed("tiif/parse_cases.json"))
def test_tiif_parser(path):
  for case in read(path)["cases"]:
    if "preds" in case:
      assert tiif.parse(case["text"], case["n_questions"]) == case["preds"], case["text"]
      continue
    with pytest.raises(tiif.Unparsable) as caught:
      tiif.parse(case["text"], case["n_questions"])
    assert re.findall(r"\d+", str(caught.value)) == re.findall(r"\d+", case["message"])


@pytest.mark.parametrize("path", listed("tiif/gned_cases.json"))
def test_tiif_word_metric(path):
  for case in read(path)["cases"]:
    got = official.read_words(case["input"])
    want = {k: v for k, v in case["expected"].items() if k in got}
    assert len(want) == 4
    assert got == {k: near(v) for k, v in want.items()}


@pytest.mark.parametrize("path", listed("genai_bench/*/vqascores.json"))
def test_genai_bench_means(path):
  expected, skills = read(path.parent / "expected.json"), read(path.parent / "genai_skills.json")
  prompts = read(path.parent / "genai_image.json")
  genai_bench.check_skills(skills, prompts)
  scores = read(path)
  assert set(scores) <= set(prompts)
  got = genai_bench.aggregate(scores, skills)
  for tag, want in expected["exact_mean"].items():
    assert got["tags"][tag]["score"] == near(want), tag
    assert got["tags"][tag]["deviation"] == near(expected["exact_std_unbiased"][tag]), tag
  for group, tags in expected["printed"].items():
    assert set(tags) == set(official.TAG_GROUPS[group])
    for tag, want in tags.items():
      assert official.genai_printed(got["tags"][tag]) == (want["mean"], want["std"])
  text = (path.parent / "official_stdout.txt").read_text()
  model = text.splitlines()[2].split()[0]
  assert official.genai_text(got, model).split() == text.split()


@pytest.fixture(params=listed("oneig/*/stub_model_outputs.json"))
def one(request):
  """A OneIG case: its folder, what the models said, what the official scripts made of it."""
  folder = request.param.parent
  return folder, read(request.param), read(folder / "expected.json")


def grids(folder, stub, name):
  """(prompt id, number of cells that are not black) of a folder of grids."""
  columns, rows = questions_lib.parse_grid(stub["grid"])
  for path in sorted((folder / "images" / name).glob("*/*")):
    image = np.asarray(Image.open(path).convert("RGB"))
    cells = official.split_grid(image, columns, rows)
    yield path.stem, len(cells)


def test_oneig_alignment(one):
  folder, stub, expected = one
  summary = base.GroupMeans()
  for name in oneig.ALIGNED:
    table = oneig.read_questions(folder / "Q_D" / f"{name}.json")
    for number, cells in grids(folder, stub, name):
      questions, dependency = table[number]
      score = summary.add(name, number, (
          oneig.alignment_cell(
              {q: oneig.says_yes(stub["alignment_answers"][text][cell])
               for q, text in questions.items()}, dependency)
          for cell in range(cells)))
      want = expected["alignment_per_prompt"].get(f"{name}_{number}")
      assert score == near(want), number
  assert summary.value()["score"] == near(expected["alignment"])


def test_oneig_text(one):
  folder, stub, expected = one
  summary = oneig.TextSummary()
  with open(folder / "text_content.csv", encoding="utf-8", newline="") as file:
    contents = {row["id"]: row["text_content"] for row in csv.DictReader(file)}
  for number, cells in grids(folder, stub, "text"):
    assert oneig.transcription_limit(contents[number]) == expected["text_max_new_tokens"][number]
    found = [oneig.text_cell(contents[number], text)
             for text in stub["ocr_outputs"][number][:cells]]
    assert summary.add(number, found) == near(expected["text_per_prompt_ED_CR_WAC"][number])
  got = summary.value()
  assert {n: got[n] for n in ("ED", "CR", "WAC")} == {
      n: near(expected["text"][n]) for n in ("ED", "CR", "WAC")}
  assert got["score"] == near(expected["text"]["text score"])


def test_oneig_reasoning_style_and_diversity(one):
  folder, stub, expected = one
  reasoning, style, diversity = (base.GroupMeans() for _ in range(3))
  for number, cells in grids(folder, stub, "reasoning"):
    reasoning.add("reasoning", number, stub["reasoning_similarity"][number][:cells])
  assert reasoning.value()["score"] == near(expected["reasoning"])
  with open(folder / "style.csv", encoding="utf-8", newline="") as file:
    classes = {row["id"]: row["class"] for row in csv.DictReader(file)}
  for number, cells in grids(folder, stub, "anime"):
    if classes[number]:
      style.add("anime", number, (_style(stub, classes[number], number, c) for c in range(cells)))
  assert style.value()["score"] == near(expected["style"])
  for name in oneig.FOLDERS.values():
    for number, cells in grids(folder, stub, name):
      distances = stub["dreamsim_pair_distance"].get(f"{name}/{number}", {})
      pairs = [distances[f"{a}-{b}"] for a, b in itertools.combinations(range(cells), 2)]
      if pairs:
        diversity.add(name, number, pairs)
  got = diversity.value()
  assert got["score"] == near(expected["diversity"])
  assert got["folders"] == {n: near(v) for n, v in expected["diversity_per_class"].items()
                            if v is not None and not math.isnan(v)}


def _style(stub, style, number, cell):
  best = []
  for model, embeddings in stub["style_image_embeddings"].items():
    references = stub["style_reference_embeddings"][model][official.style_name(style)]
    best.append(official.largest_similarity(embeddings[number][cell], references))
  return oneig.style_cell(*best)


def test_oneig_overall_is_the_mean_of_five(one):
  _, _, expected = one
  parts = {n: expected[n] for n in oneig.PARTS if n != "text"}
  got = oneig.overall(parts | {"text": expected["text"]["text score"]})
  assert got == near(expected["overall_mean_of_five"])
