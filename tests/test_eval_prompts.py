"""The official prompt files: what is read from them, and what is said about broken ones."""

import collections
import csv
import json
import pathlib

import pytest

from irg_jax import evaluate
from irg_jax.evaluate import base, geneval, oneig, tiif, wise

GENEVAL = geneval.FILES / "evaluation_metadata.jsonl"
ONEIG_COLUMNS = ["category", "id", "prompt_en", "type", "prompt_length", "class"]


def read(benchmark, path=None):
  return evaluate.get(benchmark).read(path)


def check_counts(items):
  evaluate.get(items[0].benchmark).check_counts(items)


def test_a_lone_surrogate_in_a_prompt_is_named_with_file_and_id(tmp_path):
  for number, text in enumerate(("\ud83e", "fox \udd8a", "\ude00 x")):
    records = wise_records(range(1, 4))
    records[number]["Prompt"] = text
    with pytest.raises(ValueError, match=rf"w.json: the prompt of {number + 1} has a lone surrog"):
      read("wise", write_json(tmp_path / "w.json", records))


def tasks(item):
  return evaluate.get(item.benchmark).tasks(item)


def known_tasks(items):
  return list(dict.fromkeys(task for item in items for task in tasks(item)))


def wise_records(ids):
  return [{"Prompt": f"prompt {i}", "Explanation": "why", "Category": "c", "Subcategory": "s",
           "prompt_id": i} for i in ids]


def write_json(path, content, **kwargs):
  path.write_text(json.dumps(content, **kwargs))
  return path


def write_lines(path, records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def tiif_records(count, attribute="style"):
  return [{"type": attribute, "short_description": f"short {i}", "long_description": f"long {i}"}
          for i in range(count)]


def write_oneig(path, rows):
  with path.open("w", newline="") as f:
    csv.writer(f).writerows([ONEIG_COLUMNS, *rows])
  return path


def genai_records(count):
  return {f"{i:05}": {"id": f"{i:05}", "prompt": f"prompt {i}", "models": {}} for i in range(count)}


def test_the_prompts_of_geneval_come_with_the_package():
  items = read("geneval")
  check_counts(items)
  assert [i.id for i in items[:2]] == ["00000", "00001"] and items[-1].id == "00552"
  assert {i.images for i in items} == {4}
  assert collections.Counter(t for i in items for t in tasks(i)) == geneval.COUNTS
  assert [i.extra for i in items] == [json.loads(line) for line in GENEVAL.open()]
  names = (geneval.FILES / "object_names.txt").read_text().split("\n")[:-1]
  assert len(names) == 80 and {c["class"] for i in items for c in i.extra["include"]} <= set(names)
  assert "MIT License" in (geneval.FILES / "LICENSE").read_text()


def test_wise_reads_alike_from_three_files_and_from_one(tmp_path):
  parts = {"cultural_common_sense": range(1, 401), "spatio-temporal_reasoning": range(401, 701),
           "natural_science": range(701, 1001)}
  for name, ids in parts.items():
    write_json(tmp_path / f"{name}.json", wise_records(ids))
  one = write_json(tmp_path / "final_data.json", wise_records(reversed(range(1, 1001))), indent=1)
  items = read("wise", tmp_path)
  check_counts(items)
  assert items == read("wise", one)
  assert known_tasks(items) == list(wise.RANGES)
  by_task = collections.Counter(t for i in items for t in tasks(i))
  assert by_task == {"CULTURE": 400, "TIME": 167, "SPACE": 133, "BIOLOGY": 100, "PHYSICS": 100,
                     "CHEMISTRY": 100}
  (tmp_path / "natural_science.json").unlink()
  with pytest.raises(ValueError, match="no file natural_science.json"):
    read("wise", tmp_path)
  with pytest.raises(ValueError, match="399 prompts of CULTURE, but wise as published has 400"):
    check_counts(items[1:])


def test_tiif_takes_short_and_long_for_two_items(tmp_path):
  for name, (mini, _) in tiif.COUNTS.items():
    write_lines(tmp_path / f"{name}_prompts.jsonl", tiif_records(mini, name))
  items = read("tiif", tmp_path)
  check_counts(items)
  assert len(items) == 2 * 277 and len(known_tasks(items)) == 39
  style = [i for i in items if tasks(i) == ("style",)]
  assert [(i.id, i.prompt, i.images) for i in style[:3]] == [
      ("style/short/0", "short 0", 1), ("style/long/0", "long 0", 1),
      ("style/short/1", "short 1", 1)]
  assert style[1].extra["length"] == "long" and style[1].extra["attribute"] == "style"
  with pytest.raises(ValueError, match="59 prompts of style, but tiif as published has 60"):
    check_counts([i for i in items if i.id != "style/long/0"])


def test_genai_bench_is_indexed_by_key(tmp_path):
  records = genai_records(1600)
  path = write_json(tmp_path / "genai_image.json", dict(reversed(records.items())))
  write_json(tmp_path / "genai_skills.json", {"counting": [1, 3], "basic": [3]})
  items = read("genai_bench", tmp_path)
  check_counts(items)
  assert items[0].id == "01599" and items[-1].prompt == "prompt 0"
  assert tasks(items[-4]) == ("counting", "basic") and tasks(items[0]) == ()
  assert read("genai_bench", path) == items
  with pytest.raises(ValueError, match="1599 prompts, but GenAI-Bench has 1600"):
    check_counts(items[1:])


def test_oneig_ids_start_anew_in_each_category(tmp_path):
  rows = [(c, f"{i:03}", f'{c}, "{i}",\nin two lines', "T, P", "short", "")
          for c, n in zip(oneig.FOLDERS, (245, 244, 206, 200, 225)) for i in range(n)]
  path = write_oneig(tmp_path / "OneIG-Bench.csv", rows)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel saves it
  items = read("oneig", tmp_path)
  check_counts(items)
  assert len(items) == 1120 and {i.images for i in items} == {4}
  assert (items[0].id, items[-1].id) == ("anime/000", "reasoning/224")
  assert items[1].prompt == 'Anime_Stylization, "1",\nin two lines'
  with pytest.raises(ValueError, match="244 prompts of anime"):
    check_counts(items[1:])


def break_geneval(change):
  def write(folder):
    records = [json.loads(line) for line in GENEVAL.open()][:300]
    change(records)
    return write_lines(folder / "geneval.jsonl", records)
  return "geneval", write


def geneval_case(line, **changes):
  return break_geneval(lambda records: records[line - 1].update(changes))


def raw(benchmark, name, text):
  def write(folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name
  return benchmark, write


def wise_case(change):
  def write(folder):
    records = wise_records(range(1, 6))
    change(records)
    return write_json(folder / "wise.json", records, indent=2)
  return "wise", write


def oneig_case(*rows):
  return "oneig", lambda folder: write_oneig(folder / "OneIG-Bench.csv", rows)


def tiif_case(name, records):
  def write(folder):
    write_lines(folder / "t" / name, records)
    return folder / "t"
  return "tiif", write


GOOD_ROW = ("Portrait", "000", "a man\nin the rain", "NP", "short", "")


@pytest.mark.parametrize("case, message", [
    (geneval_case(3, tag="colour"), "geneval.jsonl, line 3: unknown tag 'colour'"),
    (geneval_case(4, prompt="  "), "geneval.jsonl, line 4: 'prompt' is empty"),
    (geneval_case(4, prompt=None), "geneval.jsonl, line 4: 'prompt' is None; it must be text"),
    (geneval_case(5, include=[]), "geneval.jsonl, line 5: 'include' is empty"),
    (geneval_case(5, include=["cow"]), "geneval.jsonl, line 5: 'cow' is not an object"),
    (geneval_case(6, include=[{"class": "cow"}]), "geneval.jsonl, line 6: has no field 'count'"),
    (geneval_case(6, include=[{"class": "cow", "count": True}]), "line 6: 'count' is True"),
    (geneval_case(6, exclude=[{"class": "cow", "count": 0}]), "line 6: 'count' is 0, but must"),
    (geneval_case(7, include=[{"class": "cow", "count": 1, "position": ["above", 0]}]),
     "geneval.jsonl, line 7: position"),
    (break_geneval(lambda records: records.insert(250, records[9])),
     "geneval.jsonl, line 251: the prompt .* is there already, at .*line 10"),
    (raw("geneval", "a.jsonl", '{"tag": "colors"}\n\n'), "a.jsonl, line 1: has no field"),
    (raw("geneval", "a.jsonl", '{}\n{"tag": \n'), "a.jsonl, line 2: not JSON"),
    (raw("geneval", "a.jsonl", '{}\n\n{}'), "a.jsonl, line 2: is empty"),
    (raw("geneval", "a.jsonl", '{}\n[1]'), "a.jsonl, line 2: must be a JSON object"),
    (raw("geneval", "a.jsonl", b'{}\n\xff'), "a.jsonl, line 2: not UTF-8"),
    (wise_case(lambda r: r[2].pop("Explanation")), "line 16: has no field 'Explanation'"),
    (wise_case(lambda r: r[2].update(prompt_id="3")), "line 16: 'prompt_id' is '3'"),
    (wise_case(lambda r: r[1].update(prompt_id=1001)), "line 9: prompt_id 1001 is not from 1"),
    (wise_case(lambda r: r[4].update(prompt_id=2)),
     "line 30: prompt_id 2 is there already, at .*line 9"),
    (raw("wise", "w.json", '[{"Prompt": "a"},\n {"Prompt"}]'), "w.json, line 2: not JSON"),
    (raw("wise", "w.json", '"prompts"'), "w.json: must be a JSON array or object"),
    (raw("wise", "w.json", "[]"), "holds no prompts"),
    (raw("genai_bench", "g.json", '{"00001": {"id": "00001", "prompt": "a"},\n "00001": '
         '{"id": "00001", "prompt": "b"}}'), "g.json, line 2: prompt 1 is there already.*line 1"),
    (raw("genai_bench", "g.json", '{"00001":\n {"id": "00002", "prompt": "a"}}'),
     "g.json, line 1: id '00002' under the key '00001'"),
    (raw("genai_bench", "g.json", '{"../x": {"id": "../x", "prompt": "a"}}'), "under keys like"),
    (raw("genai_bench", "g.json", '[{"id": "00001", "prompt": "a"}]'), "under keys like"),
    (oneig_case(GOOD_ROW, ("Portraits", "001", "a", "NP", "short", "")),
     "OneIG-Bench.csv, line 4: unknown category 'Portraits'"),
    (oneig_case(GOOD_ROW, ("Portrait", "1", "a", "NP", "short", "")), "line 4: id '1' must be"),
    (oneig_case(GOOD_ROW, ("Portrait", "001", "", "NP", "short", "")), "line 4: 'prompt_en' is"),
    (oneig_case(GOOD_ROW, ("Portrait", "001")), "line 4: has another number of fields"),
    (oneig_case(GOOD_ROW, GOOD_ROW), "line 4: Portrait 000 is there already, at .*line 2"),
    (raw("oneig", "o.csv", "category,id\n"), "o.csv, line 1: no column 'prompt_en'"),
    (tiif_case("style_prompts.jsonl", tiif_records(2) + [{"type": "style"}]),
     "style_prompts.jsonl, line 3: has no field 'short_description'"),
    (tiif_case("style_eval_prompts.jsonl", tiif_records(1)), "'style_eval' is not one of TIIF's"),
    (tiif_case("readme.txt", []), "no files TYPE_prompts.jsonl"),
])
def test_a_broken_file_is_named_with_the_line(case, message, tmp_path):
  benchmark, write = case
  with pytest.raises(ValueError, match=message):
    read(benchmark, write(tmp_path))


def test_what_cannot_be_read_at_all_is_named(tmp_path):
  with pytest.raises(ValueError, match="no such file or folder"):
    read("wise", tmp_path / "nothing")
  with pytest.raises(ValueError, match="give the path of your copy of tiif's prompts"):
    read("tiif")
  with pytest.raises(ValueError, match="unknown benchmark 'clip'"):
    read("clip")


def item(benchmark, name):
  return base.Item(benchmark, name, "p", 1, {})


@pytest.mark.parametrize("benchmark, name, image, path", [
    ("geneval", "00007", 3, "round2/00007/samples/00003.png"),
    ("wise", "901", 0, "round2/901.png"),
    ("tiif", "color+2d/short/0", 0, "round2/color+2d/irg_jax/short_description/0.png"),
    ("tiif", "text/long/12", 0, "round2/text/irg_jax/long_description/12.png"),
    ("genai_bench", "00001", 0, "round2/irg_jax/00001.jpeg"),
    ("oneig", "anime/000", 3, "round2/images/anime/irg_jax/000.webp"),
])
def test_images_are_where_the_official_scorer_looks(benchmark, name, image, path):
  found = evaluate.get(benchmark).image_path(item(benchmark, name), image, 2)
  assert found == pathlib.PurePath(path)


def test_no_two_images_of_a_benchmark_share_seed_or_place():
  items = read("geneval")
  all_of = [(i, p) for i in items for p in range(4)]
  assert len({base.seed("geneval", i.id, p) for i, p in all_of}) == len(all_of)
  paths = {geneval.GENEVAL.image_path(i, p, r) for i, p in all_of for r in (1, 2)}
  assert len(paths) == 2 * len(all_of)


def test_seeds_never_change():
  # Of published images: whoever changes the rule can no longer draw them again.
  assert base.seed("geneval", "00000", 0) == 3928742260
  assert base.seed("geneval", "00000", 1) != base.seed("geneval", "00000", 0)
  assert base.seed("wise", "1", 0) != base.seed("genai_bench", "1", 0)
