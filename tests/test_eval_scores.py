"""The protocols where the official inputs do not go: what is missing, malformed, or too much."""

import json
import tracemalloc

import numpy as np
import pytest

import official
from rapidfuzz.distance import Levenshtein

from irg_jax.evaluate import base
from irg_jax.evaluate import clauses
from irg_jax.evaluate import genai_bench
from irg_jax.evaluate import geneval
from irg_jax.evaluate import oneig
from irg_jax.evaluate import questions
from irg_jax.evaluate import score
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise
from irg_jax.evaluate.base import Item
from irg_jax.evaluate.questions import Answer


def box(score, left=0.0, top=0.0, size=10.0, **more):
  return {"box": [left, top, left + size, top + size], "score": score, **more}


def image(tag, include, detections, **metadata):
  return {"filename": "00000/samples/00000.png", "detections": detections,
          "metadata": {"tag": tag, "include": include, "prompt": "p", **metadata}}


def said(text):
  return Answer("k", text=text)


# GenEval.


@pytest.mark.parametrize("tag, at", [("single_object", 0.3), ("counting", 0.9)])
def test_a_box_counts_only_above_the_threshold_of_its_task(tag, at):
  above = float(np.nextafter(np.float32(at), np.float32(1)))
  record = image(tag, [{"class": "dog", "count": 1}], {"dog": [box(at)]})
  assert official.score_image(record)["reason"] == "expected dog>=1, found 0"
  record["detections"]["dog"] = [box(above)]
  assert official.score_image(record)["correct"]


def test_only_the_surest_boxes_are_asked_for_their_colour():
  clause = [{"class": "cup", "count": 1, "color": "red"}]
  boxes = [box(0.5, color="blue"), box(0.8, color="red")]
  assert official.score_image(image("colors", clause, {"cup": boxes}))["correct"]
  boxes[1]["color"] = "blue"
  boxes[0]["color"] = "red"
  assert not official.score_image(image("colors", clause, {"cup": boxes}))["correct"]


def test_a_class_has_sixteen_boxes_at_most_and_overlaps_go_only_if_asked():
  boxes = [box(0.5 + i / 100) for i in range(20)]
  assert len(clauses.kept_boxes({"cup": boxes}, "colors")["cup"]) == 16
  apart = clauses.Options(max_overlap=0.5)
  kept = clauses.kept_boxes({"cup": [*boxes, box(0.4, left=50)]}, "colors", apart)["cup"]
  assert [round(float(b.values[4]), 2) for b in kept] == [0.69]  # the far one is the 21st
  kept = clauses.kept_boxes({"cup": [*boxes[:3], box(0.4, left=50)]}, "colors", apart)["cup"]
  assert len(kept) == 2


@pytest.mark.parametrize("left, top, want", [
    (100, 0, ["right of"]), (-100, 0, ["left of"]), (0, 100, ["below"]), (0, -100, ["above"]),
    (100, 100, ["right of", "below"]), (1, 1, []), (0, 0, [])])
def test_relations_are_seen_from_the_second_box_with_y_downward(left, top, want):
  a, b = (np.array([x, y, x + 10, y + 10, 1], np.float32) for x, y in ((left, top), (0, 0)))
  assert geneval.relations(a, b) == want


def test_a_position_is_not_looked_at_where_its_target_fails():
  include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]
  got = official.score_image(image("position", include, {"dog": [box(0.9)]}))
  assert got["reason"] == "expected cat>=1, found 0\nno target for dog to be above"


@pytest.mark.parametrize("detections, reason", [
    (None, "no detections"), ({"dog": [{"box": [1, 2, 3]}]}, "malformed box"),
    ({"dog": [box(float("nan"))]}, "malformed box"), ({"dog": [box(0.9)]}, "no colour for a box"),
    ({"dog": [box(0.9, color="mauve")]}, "unknown colour")])
def test_a_record_that_says_too_little_has_no_verdict(detections, reason):
  clause = [{"class": "dog", "count": 1, "color": "red"}]
  with pytest.raises(clauses.Unscorable) as caught:
    official.score_image(image("colors", clause, detections))
  assert caught.value.reason == reason


def geneval_run(tmp_path, rounds=(1, 2)):
  return score.ImageFolder(tmp_path, geneval.GENEVAL, tuple(geneval.GENEVAL.read()[:3]), rounds, {})


def detected(item, number, sample, score=0.99):
  path = geneval.GENEVAL.image_path(item, sample, number)
  return {"filename": str(path), "metadata": item.extra,
          "detections": {item.extra["include"][0]["class"]: [box(score)]}}


def score_lines(run, records, tmp_path, default_round=None):
  path = tmp_path / "boxes.jsonl"
  path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
  return geneval.score_detections(run, geneval.read_detections([path]), clauses.Options(), {},
                                default_round)


def test_a_image_is_counted_once_in_its_round_and_what_is_missing_is_said(tmp_path):
  run = geneval_run(tmp_path)
  first, second, third = run.items
  records = [detected(first, 1, 0), detected(first, 1, 1, score=0.1), detected(first, 2, 0),
             detected(first, 1, 0), detected(second, 1, 9), "{torn\n",
             {**detected(second, 2, 0), "metadata": third.extra},
             {**detected(third, 2, 0), "detections": None, "error": "picture: gone"}]
  got = score_lines(run, records, tmp_path)["rounds"]
  assert got["1"]["overall"] == 0.5 and got["2"]["overall"] == 1.0
  assert got["1"]["unscored"]["by_reason"] == {"came twice": 1, "no such picture": 1,
                                               "not JSON": 1}
  assert got["2"]["unscored"]["by_reason"] == {"detected for another prompt": 1, "picture": 1}
  assert got["1"]["missing"] == 10 and got["2"]["missing"] == 9
  assert not got["1"]["complete"]
  lines = [json.loads(x) for x in (tmp_path / score.ITEMS).read_text().splitlines()]
  assert [x["scores"].get("correct") for x in lines] == [1, 0, 1, None, None]
  assert lines[3]["why"].startswith("detected for another prompt: {'tag'")
  assert lines[4]["why"] == "picture: gone"


def test_a_image_of_an_unknown_round_is_refused(tmp_path):
  run = geneval_run(tmp_path)
  record = detected(run.items[0], 1, 0)
  record["filename"] = record["filename"].removeprefix("round1/")
  with pytest.raises(ValueError, match="boxes.jsonl, line 1: .*--round"):
    score_lines(run, [record], tmp_path)
  assert score_lines(run, [record], tmp_path, 2)["rounds"]["2"]["pictures"] == 1
  record["filename"] = "round3/" + record["filename"]
  with pytest.raises(ValueError, match="round 3"):
    score_lines(run, [record], tmp_path)
  assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def peak(run, records):
  tracemalloc.start()
  geneval.score_detections(run, (("", r) for r in records), clauses.Options(), {})
  return tracemalloc.get_traced_memory()[1], tracemalloc.stop()


def test_more_images_need_no_more_memory(tmp_path):
  items = tuple(Item("geneval", f"{i:05}", "p", 400, {
      "tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": f"p{i}"})
                for i in range(4))
  run = score.ImageFolder(tmp_path, geneval.GENEVAL, items, (1,), {})
  records = lambda n: (detected(item, 1, p) for item in items for p in range(n))
  peak(run, records(1))  # imports and caches
  # The least of some tries: another thread of the process may allocate meanwhile.
  few, many = (min(peak(run, records(n))[0] for _ in range(3)) for n in (10, 200))
  assert many < few + 20_000, (few, many)


# WISE.


def test_a_wise_item_without_all_three_scores_has_none(tmp_path):
  scorer = wise.Scorer()
  items = [Item("wise", str(i), "p", 1, {"prompt_id": i}) for i in (1, 401, 402)]
  good = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
  assert scorer.add(items[0], {(0, "scores"): said(good)})["scores"] == {
      "consistency": 2, "realism": 1, "aesthetic_quality": 0, "WiScore": pytest.approx(0.8)}
  partial = scorer.add(items[1], {(0, "scores"): said("Consistency: 2")})
  assert partial["scores"] == {} and "no score for realism" in partial["why"]
  assert scorer.add(items[2], {})["why"] == "no answer"
  got = scorer.value()
  assert got["unscored"]["by_reason"] == {"unparsable": 1, "no answer": 1}
  assert got["items"] == 1 and got["categories"]["TIME"]["score"] is None
  assert got["weighted"] is None and got["unweighted_partial"] is None


def full_wise(leave_out=()):
  summary = wise.Scorer()
  for number in wise.IDS:
    if number not in leave_out:
      good = 2 if number <= 400 else 0
      official.add_wise_record(summary, {"prompt_id": number, **dict.fromkeys(wise.FIELDS, good)}, "")
  return summary.value()


def test_the_two_wise_overalls_differ_and_need_every_item():
  got = full_wise()
  assert got["weighted"] == pytest.approx(0.4) and got["unweighted"] == pytest.approx(1 / 6)
  short = full_wise(leave_out=(500,))
  assert short["weighted"] is None and short["unweighted"] is None
  assert short["weighted_partial"] == pytest.approx(0.4) and short["absent_ids"] == [500]


@pytest.mark.parametrize("value", [None, "2", True, float("nan")])
def test_what_is_no_number_is_no_wise_score(value):
  summary = wise.Scorer()
  official.add_wise_record(
      summary, {"prompt_id": 1, "consistency": value, "realism": 1, "aesthetic_quality": 1}, "")
  assert summary.value()["unscored"]["by_reason"] == {"no score": 1}
  assert summary.value()["items"] == 0


# TIIF.


def write_result(folder, name, predicted):
  path = folder / "style/short" / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({"gt_answers": ["Yes"], "model_pred": [predicted]}))


def test_the_rounds_of_a_tiif_tree_are_never_pooled(tmp_path):
  for i in range(3):
    write_result(tmp_path, f"turn1_{i}.json", "no")
    write_result(tmp_path, f"turn2_{i}.json", "yes")
    write_result(tmp_path, f"comparison_{i}.json", "no")
  got = official.read_tiif_results(tmp_path)
  assert {n: r["accuracy"]["style/short"] for n, r in got.items()} == {1: 0.0, 2: 1.0}
  write_result(tmp_path, "0.json", "yes")
  with pytest.raises(ValueError, match="apart"):
    official.read_tiif_results(tmp_path)


def test_an_unreadable_tiif_file_is_counted_and_scores_nothing(tmp_path):
  write_result(tmp_path, "0.json", "yes")
  for number, text in enumerate(("{", '{"gt_answers": ["yes"]}', '{"gt_answers": [1], '
                                 '"model_pred": ["yes"]}', "[]"), 1):
    (tmp_path / f"style/short/{number}.json").write_text(text)
  got = official.read_tiif_results(tmp_path)[1]
  assert got["counts"] == {"style/short": {"questions": 1, "right": 1}}
  assert got["unscored"]["by_reason"] == {"unreadable result file": 4}


def test_a_tiif_answer_with_a_line_too_many_scores_nothing():
  scorer = tiif.Scorer({("text", 0): (["a?", "b?"], ["Yes", "yes"])})
  item = Item("tiif", "text/long/0", "p", 1, {"attribute": "text", "length": "long", "line": 0})
  assert scorer.add(item, {(0, tiif.QUESTION): said("yes\nno")})["scores"] == {"accuracy": 0.5}
  assert scorer.add(item, {(0, tiif.QUESTION): said("yes\nno\nno")})["scores"] == {}
  got = scorer.value()
  assert got["counts"] == {"text/long": {"questions": 2, "right": 1}}
  assert got["unscored"]["by_reason"] == {"unparsable": 1}
  assert got["overall"] == {"short": None, "long": 0.5}


def test_there_are_nine_tiif_groups_of_38_types_and_the_real_world():
  assert len(tiif.GROUPS) == 9 and len(set(tiif.TYPES)) == len(tiif.TYPES) == 39
  assert sorted(sum(tiif.GROUPS.values(), ())) == sorted(tiif.COUNTS)


@pytest.mark.parametrize("a, b", [("", ""), ("abc", ""), ("kitten", "sitting"), ("ab", "ba"),
                                  ("日本", "日本語"), ("a b", "ab "), ("\ud800", "x")])
def test_edit_distance_is_that_of_the_plain_recursion(a, b):
  def plain(a, b):
    if not a or not b:
      return len(a) + len(b)
    return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))
  assert Levenshtein.distance(a, b) == Levenshtein.distance(b, a) == plain(a, b)


def test_words_that_are_missing_or_too_many_cost_one_each():
  assert official.word_distance(["a", "b"], ["A"]) == 0.5
  assert official.word_distance([], []) == 0.0
  assert official.word_recall(["night"], ["nigth night"]) == 1.0
  assert official.word_recall([], ["x"]) is None


# GenAI-Bench.


def test_all_is_the_union_of_tags_and_leaves_the_untagged_out():
  skills = {"basic": [1, 2], "advanced": [2, 3]}
  got = genai_bench.aggregate({"00001": 0.0, "00002": 1.0, "00003": 0.5, "00009": 0.0}, skills)
  assert got["overall"] == 0.5 and got["untagged"] == 1
  assert got["tags"]["basic"]["score"] == 0.5 and got["tags"]["advanced"]["score"] == 0.75


def test_a_prompt_without_a_vqascore_is_absent_not_zero():
  scorer = genai_bench.Scorer({"basic": [0, 1, 2], "advanced": [3]})
  for number, probability in enumerate((0.5, None, 7.0)):
    item = Item("genai_bench", f"{number:05}", "p", 1, {})
    scorer.add(item, {(0, genai_bench.QUESTION): Answer("k", probability=probability)})
  got = scorer.value()
  assert got["tags"]["basic"] == {"score": 0.5, "deviation": None, "count": 1, "absent": 2}
  assert got["tags"]["advanced"]["score"] is None
  assert got["unscored"]["by_reason"] == {"unparsable": 1, "out of range": 1}


@pytest.mark.parametrize("numbers", ["[0.7]", "[true]", "[-1]", "[1e999]", '["x"]', "3", "[[1]]"])
def test_a_skill_of_no_prompt_numbers_is_refused(tmp_path, numbers):
  (tmp_path / "genai_skills.json").write_text(f'{{"basic": {numbers}}}')
  with pytest.raises(ValueError, match="genai_skills.json: must be a JSON object of lists"):
    genai_bench.read_skills(tmp_path / "genai_skills.json")


@pytest.mark.parametrize("question, parents, found", [
    ('{"1": "a?", "2": "b?"}', '{"1": ["0"], "2": ["1"]}', {"000": ({1: "a?", 2: "b?"}, {1: [0], 2: [1]})}),
    ("{}", "{}", {}), ('{"1": "a?"}', '{"1": 0}', None), ('{"1": 5}', '{"1": [0]}', None),
    ('{"1": "a?"}', '{"1": ["x"]}', None), ('["a?"]', '{"1": [0]}', None)])
def test_questions_and_their_parents_are_read_by_number_or_refused(tmp_path, question, parents, found):
  path = tmp_path / "anime.json"
  path.write_text(f'{{"000": {{"question": {question}, "dependency": {parents}}}}}')
  if found is None:
    with pytest.raises(ValueError, match="anime.json: prompt 000: question and dependency"):
      oneig.read_questions(path)
  else:
    assert oneig.read_questions(path) == found


@pytest.mark.parametrize("change, message", [
    ({"attribute": [5]}, "attribute.*prompt 5"), ({"attribute": "1"}, "not a list"),
    ({"attribute": None}, "no tag 'attribute'")])
def test_skills_must_fit_the_prompts(change, message):
  skills = {t: [1] for t in (*genai_bench.BASIC, *genai_bench.ADVANCED)} | change
  skills = {t: v for t, v in skills.items() if v is not None}
  with pytest.raises(ValueError, match=message):
    genai_bench.check_skills(skills, ["00001"])


# OneIG-Bench.


def test_black_cells_are_dropped_and_the_rest_keeps_its_order():
  grid = np.zeros((5, 7, 3), np.uint8)
  grid[0, 3], grid[2, 0] = 7, 9  # the second and the third cell; the rest is black
  cells = official.split_grid(grid)
  assert [c.shape for c in cells] == [(2, 3, 3), (2, 3, 3)]
  assert [int(c.max()) for c in cells] == [7, 9]
  assert questions.parse_grid("2") == (2, 2) and questions.parse_grid("1, 4") == (1, 4)
  for bad in ("", "0,2", "2x2", "1,2,3"):
    with pytest.raises(ValueError, match="columns,rows"):
      questions.parse_grid(bad)


def test_a_question_needs_its_own_parents_but_not_their_parents():
  dependency = {1: [0], 2: [1], 3: [2]}
  answers = {1: False, 2: True, 3: True}
  assert oneig.alignment_cell(answers, dependency) == pytest.approx(1 / 3)  # 3 holds: 2 said Yes


def test_text_that_is_compared_keeps_case_and_drops_signs():
  assert oneig.normalize_text(" Côte  d'Azur,\n2025! ") == "Côte dAzur 2025"
  cell = oneig.text_cell("['Open Late']", "addCriterion Open late.")
  assert cell == {"distance": 1, "exact": False, "matched": 1, "words": 2}
  assert oneig.text_cell("Open", "No text recognized.")["distance"] == 4


ONEIG = {"questions": {"anime": {"000": ({1: "a?", 2: "b?"}, {1: [0], 2: [1]})}, "human": {},
                       "object": {}}, "texts": {"000": "OPEN"}}
ANIME = Item("oneig", "anime/000", "p", 4, {"class": "line art"})


def test_an_oneig_prompt_is_scored_in_its_parts_only():
  scorer = oneig.Scorer(ONEIG)
  answers = {(0, "alignment1"): said("Yes"), (0, "alignment2"): said("yes"),
             ("style", "values"): [0.25, 0.75], ("diversity", "values"): [0.5]}
  got = scorer.add(ANIME, answers)
  assert got["scores"] == {"alignment": 1, "style": 0.5, "diversity": 0.5} and not got["why"]
  strict = oneig.Scorer(ONEIG, strict=True).add(ANIME, answers)
  assert strict["scores"] == {"alignment": 0.5, "style": 0.5, "diversity": 0.5}
  value = scorer.value()
  assert value["irregular"]["by_reason"] == {base.IRREGULAR: 1}
  assert value["overall"] is None and value["parts"]["text"]["score"] is None
  text = scorer.add(Item("oneig", "text/000", "p", 4, {"class": "menu"}), {
      (0, "text"): said("OPEN"), ("diversity", "values"): []})
  assert text["scores"] == {"ED": 0, "CR": 1, "WAC": 1}  # one cell only, so no pair either
  assert scorer.value()["parts"]["diversity"]["prompts"] == 1


def test_an_oneig_cell_without_an_answer_leaves_its_prompt_without_a_score():
  scorer = oneig.Scorer(ONEIG)
  answers = {(0, "alignment1"): said("Yes"), (0, "alignment2"): Answer("k", error="timeout: x"),
             (1, "alignment1"): said("Yes"), (1, "alignment2"): said("Yes")}
  got = scorer.add(ANIME, answers)
  assert got["scores"] == {} and got["why"] == "no score: alignment, style, diversity"
  assert scorer.value()["unscored"]["by_reason"] == {
      "alignment: a cell has no score": 1, "style: no measurement": 1,
      "diversity: no measurement": 1}


def test_the_oneig_overall_needs_all_five_parts():
  parts = dict.fromkeys(oneig.PARTS, 0.5)
  assert oneig.overall(parts) == 0.5
  assert oneig.overall(parts | {"style": None}) is None


@pytest.mark.parametrize("line, message", [
    ('{"round": 1, "part": "style", "id": "anime/000", "values": [0.5]}', "line 1"),
    ('{"round": 1, "part": "vqascore", "id": "x", "values": [0.5]}', "vqascore"),
    ('{"round": 1, "part": "reasoning", "id": "x", "values": [NaN]}', "not a number"),
    ('{"round": 1, "part": "reasoning", "id": "x", "values": [85]}', "line 1: 85 is not from -1.01"),
    ('{"round": 1, "part": "style", "id": "x", "values": [[0.2, 90]]}', "line 1: 90 is not from"),
    ('{"round": 1, "part": "diversity", "id": "x", "values": [-0.5]}', "line 1: -0.5 is not from"),
    ('{"round": 1, "id": "x", "values": []}', "part"), ("{", "line 1"),
    ('{"round": 1, "part": "reasoning", "id": "x", "values": []}\n' * 2, "line 2.*already")])
def test_a_measurement_that_cannot_be_is_refused_with_its_line(tmp_path, line, message):
  path = tmp_path / "m.jsonl"
  path.write_text(line)
  with pytest.raises(ValueError, match=message):
    score.read_measurements(path, oneig.MEASURED)


# Any benchmark.


def test_a_prompt_that_comes_twice_is_refused_and_leaves_no_files(tmp_path):
  item = Item("wise", "1", "p", 1, {"prompt_id": 1})
  run = score.ImageFolder(tmp_path, wise.WISE, (item,), (1,), {})
  with pytest.raises(ValueError, match="came twice"):
    score.score_answers(run, wise.Scorer, [(item, 1, {}), (item, 1, {})], {})
  assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_goes_away_and_what_is_being_written_stays(tmp_path):
  (tmp_path / ".0123abcd.partial").write_text("half a li")
  with score.new_text(tmp_path / "a") as a, score.new_text(tmp_path / "b") as b:
    a.write("1")
    b.write("2")
  assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "1", "b": "2"}


def test_unscored_items_are_all_counted_and_a_few_are_named():
  unscored = base.Unscored(limit=2)
  for i in range(5):
    unscored.add(str(i), "empty" if i else "late")
  assert unscored.summary()["by_reason"] == {"late": 1, "empty": 4}
  assert [e["item"] for e in unscored.examples] == ["0", "1"]
