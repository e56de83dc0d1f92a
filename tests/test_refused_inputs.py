"""Inputs of scoring that would give a wrong number: refused by name, or read rightly."""

import collections
import csv
import io
import json
import random

import pytest

from irg_jax import commands
from irg_jax.evaluate import geneval
from irg_jax.evaluate import oneig
from irg_jax.evaluate import records
from irg_jax.evaluate import wise
from irg_jax.reports import pages

ITEM = geneval.GENEVAL.read()[30]  # a photo of a computer mouse


def score_geneval(tmp_path, capfd, *lines):
  """(exit status, output, lines of items.jsonl) of scoring records of detections."""
  (tmp_path / "out/round1").mkdir(parents=True, exist_ok=True)
  path = tmp_path / "found.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  status = commands.main(["eval", "score", "geneval", "--out", str(tmp_path / "out"),
                          "--detections", str(path)])
  items = tmp_path / "out/items.jsonl"
  said = "".join(capfd.readouterr())
  lines = items.read_text().splitlines() if status == 0 else []
  return status, said, [json.loads(line) for line in lines]


def record(detections, image=0):
  return {"filename": f"round1/00030/samples/{image:05}.png", "metadata": ITEM.extra,
          "detections": detections}


def box(score=0.95, corners=(10, 10, 50, 50)):
  return [{"box": list(corners), "score": score}]


@pytest.mark.parametrize("detections", [
    {"64": box()}, {"Computer Mouse": box()}, {"rat": box()}, {"computer_mouse": box()},
    {"": box()},
    {"mouse": box(), "computer mouse": box()}, {"computer mouse": box(corners=(300, 300, 40, 40))},
    {"computer mouse": box(corners=(0, 9, 5, 3))}, {"computer mouse": box(95)}, {"dog": box(1.2)},
    {"dog": box(-0.1)}, {"dog": [[1, 2, 3, 4, 0.5]]}, {"dog": box("high")}, {"dog": None},
    {"dog": box("0.9")}, {"dog": box(True)}, {"dog": box(corners=(False, False, True, True))},
    {"dog": box(corners=(1, 2, 3))}, {"dog": box(corners=(10**400, 0, 1, 1))},
    {"dog": box(corners=(0, 0, 1e39, 1))}, None, [], [{"class": "dog", "box": [1, 2, 3, 4]}]])
def test_a_class_or_box_that_cannot_be_is_refused_with_its_line(tmp_path, capfd, detections):
  good = record({"computer mouse": box()})
  status, said, _ = score_geneval(tmp_path, capfd, good, record(detections, 1))
  assert status == 2 and "found.jsonl, line 2: " in said and "Traceback" not in said


@pytest.mark.parametrize("content", [
    '{"image_id": 1, "category_id": 64, "bbox": [1, 2, 3, 4], "score": 0.9}\n', "[\n{}]\n", "{\n", "x"])
def test_a_file_of_another_kind_is_refused_with_its_line(tmp_path, content):
  names = geneval.class_names(geneval.FILES / "object_names.txt")
  (tmp_path / "found.jsonl").write_text(content)
  with pytest.raises(ValueError, match="found.jsonl, line 1: neither a record"):
    list(geneval.read_detections([tmp_path / "found.jsonl"], names, collections.Counter()))


@pytest.mark.parametrize("theirs, ours", geneval.ALIASES.items())
def test_known_other_names_are_mapped_and_named(tmp_path, capfd, theirs, ours):
  names = geneval.class_names(geneval.FILES / "object_names.txt")
  aliases = collections.Counter()
  path = tmp_path / "found.jsonl"
  path.write_text(json.dumps(record({theirs: box()})) + "\n")
  (_, found), = geneval.read_detections([path], names, aliases)
  assert list(found["detections"]) == [ours] and aliases == {(theirs, ours): 1}


def test_a_mapped_name_is_said_at_the_terminal(tmp_path, capfd):
  status, said, items = score_geneval(tmp_path, capfd, record({"mouse": box()}))
  assert status == 0 and items[0]["scores"] == {"correct": 1}
  assert "class 'mouse' taken for 'computer mouse', in 1 records" in said


def official_line(correct, image=0, **changes):
  return {"filename": f"/data/00030/samples/{image:05}.png", "tag": ITEM.extra["tag"],
          "prompt": ITEM.prompt, "correct": correct, "reason": "" if correct else "expected a\nb",
          "metadata": json.dumps(ITEM.extra), "details": "{}"} | changes


def test_the_official_results_are_scored_by_their_own_verdicts(tmp_path, capfd):
  lines = [official_line(True), official_line(False, 1), official_line("yes", 2),
           official_line(True, 3, metadata=json.dumps({"tag": "x"}))]
  status, said, items = score_geneval(tmp_path, capfd, *lines)
  assert status == 0 and [x["scores"].get("correct") for x in items] == [1, 0, None, None]
  assert items[1]["words"] == "expected a\nb" and "not a verdict" in items[2]["why"]
  assert "detected for another prompt" in items[3]["why"] and "2 without a score" in said


def test_200_made_up_detections_are_refused_or_scored_as_a_plain_reading_does(tmp_path, capfd):
  dice, names = random.Random(0), geneval.class_names(geneval.FILES / "object_names.txt")
  path = tmp_path / "found.jsonl"
  for _ in range(200):
    name = dice.choice(["computer mouse"] * 5 + ["mouse", "Mouse", "64", "dog"])
    corners = [dice.choice((0, 5, 10, 20, 300)) for _ in range(4)]
    score = dice.choice((0.95, 0.31, 0.3, 0.1, 1.0, 1.5, -1, 30))
    path.write_text(json.dumps(record({name: [{"box": corners, "score": score}]})))
    fits = (name in ("computer mouse", "mouse", "dog") and 0 <= score <= 1
            and corners[0] <= corners[2] and corners[1] <= corners[3])
    try:
      (_, found), = geneval.read_detections([path], names, collections.Counter())
      right = not geneval.verdict(ITEM.extra, found["detections"])
      assert fits and right == (name != "dog" and score > 0.3)
    except ValueError as e:
      assert not fits and "found.jsonl, line 1" in str(e)


def wise_file(path, *entries):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps([{"Prompt": "p", "Explanation": "e", "Category": c, "Subcategory": "s",
                               "prompt_id": i} for i, c in entries], indent=0))
  return path


@pytest.mark.parametrize("name, number, category", [
    ("merge.json", 660, "Biology"), ("a.json", 540, "Space"), ("a.json", 790, "physics"),
    ("a.json", 881, "CHEMISTRY "), ("a.json", 401, "Cultural knowledge"), ("a.json", 3, "Time"),
    ("wise_verified.json", 1, "Cultural knowledge"), ("data_verified/x.json", 1, "c")])
def test_prompts_of_wise_verified_are_refused(tmp_path, name, number, category):
  path = wise_file(tmp_path / name, (number, category))
  with pytest.raises(ValueError, match="WISE_Verified.*WISE_legacy/data"):
    wise.WISE.read(path)


def test_a_folder_of_wise_verified_is_refused_and_files_of_today_are_read(tmp_path):
  wise_file(tmp_path / "verified/merge.json", (1, "c"))
  with pytest.raises(ValueError, match="WISE_Verified"):
    wise.WISE.read(tmp_path / "verified")
  fits = ((1, "Cultural knowledge"), (401, "time"), (568, "Space"), (701, "Biology"),
          (801, "Physics"), (901, "Chemistry"), (402, "Spatio-temporal reasoning"))
  assert len(wise.WISE.read(wise_file(tmp_path / "final_data.json", *fits))) == len(fits)


HEAD = "category,id,prompt_en,type,prompt_length,class\n"


@pytest.mark.parametrize("rows, line", [
    ('Portrait,000,"a "big" man",T,s,\n', 2), ('Portrait,000,a,T,s,\nPortrait,001,"a" man,T,s,\n',
    3),
    ('Portrait,000,"a man,T,s,\nPortrait,001,a,T,s,\n', 2), ('Portrait,000,"a ""big" man",T,s,\n',
    2)])
def test_a_csv_with_stray_quotes_is_refused_with_its_line(tmp_path, rows, line):
  path = tmp_path / "OneIG-Bench.csv"
  path.write_text(HEAD + rows)
  with pytest.raises(ValueError, match=rf"OneIG-Bench.csv, line {line}: not CSV"):
    oneig.ONEIG.read(path)


@pytest.mark.parametrize("name, head, row, message", [
    ("OneIG-Bench-ZH.csv", HEAD, "Portrait,000,a man,T,s,\n", "Chinese half"),
    ("a.csv", HEAD, "Portrait,000,一个男人坐在公园的长椅上,T,s,\n", "line 2: is the Chinese half"),
    ("a.csv", HEAD.replace("prompt_en", "prompt_cn"), "Portrait,000,x,T,s,\n",
    "no column 'prompt_en'")])
def test_the_chinese_half_of_oneig_is_refused(tmp_path, name, head, row, message):
  path = tmp_path / name
  path.write_text(head + row)
  with pytest.raises(ValueError, match=message):
    oneig.ONEIG.read(path)


def test_200_made_up_csv_files_are_read_as_written_or_refused(tmp_path):
  dice, path = random.Random(1), tmp_path / "t.csv"
  for _ in range(200):
    texts = ["".join(dice.choice('ab ",\n日') for _ in range(dice.randint(0, 12))) for _ in range(3)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("id", "text"), *enumerate(texts)])
    whole, broken = out.getvalue(), None
    if '",' not in whole and (at := whole.find('"')) >= 0 and dice.random() < 0.5:
      broken = f'{whole[: at + 1]}x" y{whole[at + 1 :]}'  # a field goes on after its quotes
    path.write_text(broken or whole, newline="")
    try:
      found = [e.record["text"] for e in records.csv_rows(path, ("id", "text"))]
      assert not broken and found == texts
    except ValueError as e:
      assert broken and "t.csv, line " in str(e)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 9000 + "}", '{"a":' * 50_000])
def test_json_that_cannot_be_read_is_refused_with_its_file(tmp_path, text):
  path = tmp_path / "a.jsonl"
  path.write_text(text)
  for reader in (records.json_lines, records.json_records):
    with pytest.raises(ValueError, match="a.jsonl.*: not JSON"):
      reader(path)
  assert [record for _, record in records.read_lines(path)] == [None]


@pytest.mark.parametrize("text, shown", [
    ("a\u202eb", "a[U+202E]b"), ("\x1b[31m", "[U+001B][31m"), ("\x00\x9b\u2066x\u2069",
    "[U+0000][U+009B][U+2066]x[U+2069]"),
    ("line\u2028x\ufeff", "line[U+2028]x[U+FEFF]"), ("a\tb\nc", "a\tb\nc"), ("שלום 👩\u200d🚀",
    "שלום 👩\u200d🚀")])
def test_signs_that_act_are_shown_in_pages_and_lines(text, shown):
  assert pages.shown(text) == shown
  assert pages.short(text) == " ".join(pages.shown(" ".join(text.split())).split())
  page = pages.render("evaluation", sections=[], links={}, notes=[text], caveats=[])
  assert shown in page and (text == shown or text not in page)
  assert pages.thought(f"<think>{text}") == f'<span class="tag">&lt;think&gt;</span>{shown}'


def test_a_text_of_megabytes_makes_a_page_of_kilobytes():
  text = "a<\u202e" * 3_000_000
  page = pages.render("evaluation", sections=[], links={}, notes=[text] * 3, caveats=[])
  assert len(page) < 600_000 and "more characters)" in page and len(pages.thought(text)) < 400_000
  assert len(pages.data_uri(b"x" * 300_000)) > 400_000  # images are whole
