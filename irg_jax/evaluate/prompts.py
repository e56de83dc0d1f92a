"""The prompts of the benchmarks, read from the official files as published.

GenEval's files come with this package (`files/geneval`, MIT), and so do the mini world's; the
others carry no clear licence, so their paths are asked for.
"""

import collections
import dataclasses
import json
import pathlib
import re

from irg_jax.evaluate.prompt_files import (
    check_unique, csv_rows, field, json_lines, json_records)

BENCHMARKS = ("geneval", "wise", "tiif", "genai_bench", "oneig", "mini")
GENEVAL_FILES = pathlib.Path(__file__).parent / "files" / "geneval"
MINI_FILES = pathlib.Path(__file__).parents[1] / "mini" / "files"
_PACKAGED = {"geneval": GENEVAL_FILES, "mini": MINI_FILES}
GENEVAL_TASKS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94,
                 "position": 100, "color_attr": 100}
MINI_SPLITS = {"seen": 168, "unseen": 96}
# Last prompt_id of each category.
WISE_CATEGORIES = {"CULTURE": 400, "TIME": 567, "SPACE": 700, "BIOLOGY": 800, "PHYSICS": 900,
                   "CHEMISTRY": 1000}
ONEIG_FOLDERS = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object",
                 "Text_Rendering": "text", "Knowledge_Reasoning": "reasoning"}
# Prompts of a type in testmini and in the whole test set.
_TIIF_COUNTS = {
    (8, 75): "2d_spatial_relation 3d_spatial_relation action+2d action+3d comparison "
             "differentiation negation numeracy",
    (5, 50): "action+color action+texture color+texture texture+color",
    (4, 33): "color+2d color+3d shape+2d shape+3d texture+2d texture+3d",
    (4, 40): "comparison+2d comparison+3d comparison+color comparison+texture "
             "differentiation+2d differentiation+3d differentiation+color "
             "differentiation+texture negation+2d negation+3d negation+color negation+texture "
             "numeracy+2d numeracy+3d numeracy+color numeracy+texture",
    (10, 100): "shape+color shape+texture", (25, 100): "real_world", (30, 300): "style text"}
TIIF_TYPES = {name: counts for counts, names in _TIIF_COUNTS.items() for name in names.split()}
_ONEIG_COUNTS = {"anime": 245, "human": 244, "object": 206, "text": 200, "reasoning": 225}
_GENAI_COUNTS = (1600, 527)


@dataclasses.dataclass(frozen=True)
class Item:
  """One prompt.

  Attributes:
    benchmark: one of `BENCHMARKS`.
    id: stable and unique in the benchmark: GenEval and mini "00000" (line from 0), WISE "901",
      TIIF "color+2d/short/0" (type/length/line from 0), GenAI-Bench "00001" (its key),
      OneIG "anime/000" (folder/id).
    prompt: what to draw.
    images: how many are drawn of it.
    extra: the official record; TIIF's with "attribute", "length" ("short", "long") and "line"
      added, GenAI-Bench's with "tags" where `genai_skills.json` lies beside.
  """

  benchmark: str
  id: str
  prompt: str
  images: int
  extra: dict


def read(benchmark: str, path=None) -> list[Item]:
  """Reads and checks the prompts of a benchmark.

  Args:
    path: GenEval: `evaluation_metadata.jsonl`; mini: `test.jsonl` (None: the one that comes with
      this package).
      WISE: the folder with the three files, or one of them, or `final_data.json`.
      TIIF: the folder `testmini_prompts` or `test_prompts`. GenAI-Bench: `genai_image.json`.
      OneIG: `OneIG-Bench.csv`. Wherever it is a file, its folder will do.

  Returns:
    The items in the order of the files, WISE's by id.

  Raises:
    ValueError: names the file, the line and what is wrong there.
  """
  if benchmark not in BENCHMARKS:
    raise ValueError(f"unknown benchmark {benchmark!r}; known: {', '.join(BENCHMARKS)}")
  if path is None and benchmark not in _PACKAGED:
    raise ValueError(f"--prompts: give the path of your copy of {benchmark}'s prompts")
  path = _PACKAGED[benchmark] if path is None else pathlib.Path(path)
  if not path.exists():
    raise ValueError(f"--prompts {path}: no such file or folder")
  items = _READERS[benchmark](path)
  if not items:
    raise ValueError(f"--prompts {path}: holds no prompts")
  return items


def tasks(item: Item) -> tuple[str, ...]:
  """What `--tasks` knows an item by.

  GenEval's tag, WISE's category (CULTURE, TIME, ...), TIIF's type, OneIG's folder; all the tags
  of GenAI-Bench; mini's tag, and "seen" or "unseen".
  """
  if item.benchmark == "geneval":
    return (item.extra["tag"],)
  if item.benchmark == "mini":
    return (item.extra["tag"], item.extra["split"])
  if item.benchmark == "wise":
    return (next(c for c, last in WISE_CATEGORIES.items() if int(item.id) <= last),)
  if item.benchmark == "genai_bench":
    return tuple(item.extra.get("tags", ()))
  return (item.id.split("/")[0],)


def known_tasks(items) -> list[str]:
  """The tasks of the items, each once, in order of first appearance."""
  return list(dict.fromkeys(task for item in items for task in tasks(item)))


def check_counts(items: list[Item]) -> None:
  """Checks that the items are the whole published set.

  Raises:
    ValueError: the first count that differs.
  """
  benchmark = items[0].benchmark
  have = collections.Counter(task for item in items for task in tasks(item))
  if benchmark == "genai_bench":
    if len(items) not in _GENAI_COUNTS:
      raise ValueError(f"{len(items)} prompts, but GenAI-Bench has 1600 (or 527)")
    return
  for task, wanted in _published(benchmark, len(items)).items():
    if have[task] != wanted:
      raise ValueError(f"{have[task]} prompts of {task}, but {benchmark} as published has {wanted}")


def _published(benchmark, count):
  """Prompts by task."""
  if benchmark == "geneval":
    return GENEVAL_TASKS
  if benchmark == "mini":
    return MINI_SPLITS
  if benchmark == "wise":
    lasts = list(WISE_CATEGORIES.values())
    return dict(zip(WISE_CATEGORIES, [b - a for a, b in zip([0, *lasts], lasts)]))
  if benchmark == "oneig":
    return _ONEIG_COUNTS
  mini, full = (sum(c[which] for c in TIIF_TYPES.values()) for which in (0, 1))
  which = count > mini + full  # two items a prompt: whichever is nearer
  return {name: 2 * counts[which] for name, counts in TIIF_TYPES.items()}


def _geneval(path):
  return _clauses("geneval", _file(path, "evaluation_metadata.jsonl"), GENEVAL_TASKS)


def _mini(path):
  return _clauses("mini", _file(path, "test.jsonl"), [*GENEVAL_TASKS, "free"], MINI_SPLITS)


def _clauses(benchmark, path, tags, splits=()):
  """Records of GenEval's form, a line each."""
  entries = json_lines(path)
  for entry in entries:
    _check_clauses(entry, tags)
    if splits and field(entry, "split", str) not in splits:
      raise ValueError(f"{entry.where}: unknown split {entry.record['split']!r}; it must be "
                       f"{' or '.join(splits)}")
  check_unique(entries, [f"the prompt {e.record['prompt']!r}" for e in entries])
  return [Item(benchmark, f"{i:05}", e.record["prompt"], 4, e.record)
          for i, e in enumerate(entries)]


def _check_clauses(entry, tags):
  field(entry, "prompt", str)
  if field(entry, "tag", str) not in tags:
    raise ValueError(f"{entry.where}: unknown tag {entry.record['tag']!r}; the tags are "
                     f"{', '.join(tags)}")
  include = field(entry, "include", list)
  if not include:
    raise ValueError(f"{entry.where}: 'include' is empty")
  if "exclude" in entry.record:
    field(entry, "exclude", list)
  for number, clause in enumerate([*include, *entry.record.get("exclude", ())]):
    place = entry._replace(record=clause)
    if not isinstance(clause, dict):
      raise ValueError(f"{entry.where}: {clause!r} is not an object with 'class' and 'count'")
    field(place, "class", str)
    if field(place, "count", int) < 1:
      raise ValueError(f"{entry.where}: 'count' is {clause['count']}, but must be 1 or more")
    if "color" in clause:
      field(place, "color", str)
    if "position" in clause:
      _check_position(entry.where, field(place, "position", list), number)


def _check_position(where, position, number):
  relations = ("left of", "right of", "above", "below")
  if not (len(position) == 2 and position[0] in relations and type(position[1]) is int
          and 0 <= position[1] < number):
    raise ValueError(f"{where}: position {position} must be [relation, index of an earlier "
                     f"clause], the relation one of {', '.join(relations)}")


def _wise(path):
  entries = [e for file in _wise_files(path) for e in json_records(file)]
  for entry in entries:
    for name in ("Prompt", "Explanation", "Category", "Subcategory"):
      field(entry, name, str)
    if not 1 <= field(entry, "prompt_id", int) <= 1000:
      raise ValueError(f"{entry.where}: prompt_id {entry.record['prompt_id']} is not from 1 to "
                       "1000")
  check_unique(entries, [f"prompt_id {e.record['prompt_id']}" for e in entries])
  entries.sort(key=lambda e: e.record["prompt_id"])
  return [Item("wise", str(e.record["prompt_id"]), e.record["Prompt"], 1, e.record)
          for e in entries]


def _wise_files(path):
  if path.is_file():
    return [path]
  three = [path / f"{name}.json" for name in (
      "cultural_common_sense", "spatio-temporal_reasoning", "natural_science")]
  if (path / "final_data.json").is_file() and not any(f.exists() for f in three):
    return [path / "final_data.json"]
  return [_file(path, file.name) for file in three]


def _tiif(path):
  suffix = "_prompts.jsonl"
  files = sorted(path.glob(f"*{suffix}"))
  if not files:
    raise ValueError(f"--prompts {path}: no files TYPE{suffix} in there; give the folder "
                     "testmini_prompts (or test_prompts)")
  items = []
  for file in files:
    attribute = file.name.removesuffix(suffix)
    if attribute not in TIIF_TYPES:
      raise ValueError(f"{file}: {attribute!r} is not one of TIIF's {len(TIIF_TYPES)} types; the "
                       "prompts are in testmini_prompts, the questions elsewhere")
    for line, entry in enumerate(json_lines(file)):
      field(entry, "type", str)
      items += [_tiif_item(entry, attribute, length, line) for length in ("short", "long")]
  return items


def _tiif_item(entry, attribute, length, line):
  prompt = field(entry, f"{length}_description", str)
  added = {"attribute": attribute, "length": length, "line": line}
  return Item("tiif", f"{attribute}/{length}/{line}", prompt, 1, entry.record | added)


def _genai_bench(path):
  file = _file(path, "genai_image.json")
  entries = json_records(file)
  for entry in entries:
    if entry.key is None or not re.fullmatch(r"\d+", entry.key):
      raise ValueError(f"{entry.where}: the records must stand under keys like \"00001\"")
    if field(entry, "id", str) != entry.key:
      raise ValueError(f"{entry.where}: id {entry.record['id']!r} under the key {entry.key!r}")
    field(entry, "prompt", str)
  check_unique(entries, [f"prompt {int(e.key)}" for e in entries])
  tags = _genai_tags(file.with_name("genai_skills.json"))
  return [Item("genai_bench", e.key, e.record["prompt"], 1,
               e.record | ({"tags": tags[int(e.key)]} if tags else {})) for e in entries]


def _genai_tags(path):
  """Tags by the number of the prompt, or nothing where there is no such file."""
  if not path.is_file():
    return {}
  found = collections.defaultdict(list)
  try:
    for tag, numbers in json.loads(path.read_text(encoding="utf-8")).items():
      for number in numbers:
        found[int(number)].append(tag)
  except (ValueError, TypeError, AttributeError) as e:
    raise ValueError(f"{path}: must be a JSON object of lists of prompt numbers ({e})") from e
  return found


def _oneig(path):
  columns = ("category", "id", "prompt_en", "type", "prompt_length", "class")
  entries = csv_rows(_file(path, "OneIG-Bench.csv"), columns)
  for entry in entries:
    if entry.record["category"] not in ONEIG_FOLDERS:
      raise ValueError(f"{entry.where}: unknown category {entry.record['category']!r}; the "
                       f"categories are {', '.join(ONEIG_FOLDERS)}")
    if not re.fullmatch(r"\d{3}", entry.record["id"]):
      raise ValueError(f"{entry.where}: id {entry.record['id']!r} must be three digits")
    field(entry, "prompt_en", str)
  check_unique(entries, [f"{e.record['category']} {e.record['id']}" for e in entries])
  return [Item("oneig", f"{ONEIG_FOLDERS[e.record['category']]}/{e.record['id']}",
               e.record["prompt_en"], 4, e.record) for e in entries]


def _file(path, name):
  """`path`, or the file `name` in it."""
  file = path / name if path.is_dir() else path
  if not file.is_file():
    raise ValueError(f"--prompts {path}: no file {name} in there")
  return file


_READERS = {"geneval": _geneval, "wise": _wise, "tiif": _tiif, "genai_bench": _genai_bench,
            "oneig": _oneig, "mini": _mini}
