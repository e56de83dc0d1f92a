"""The protocol of a benchmark, and what all benchmarks share: items, seeds, traces, means.

A benchmark is a subclass of `Benchmark` in a file of its own, and its texts and published figures
are in files/NAME.toml. It is registered in `evaluate/__init__.py`; nothing else names it.
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import tomllib

from irg_jax import messages, storage
from irg_jax.evaluate import questions

FILES = pathlib.Path(__file__).parent / "files"
PUBLISHED = ("BAGEL, published", "BAGEL self-CoT, published", "IRG (2 rounds), published")
MODEL = "irg_jax"  # the model's name where an official layout has one
IRREGULAR = "scored, but not in the official form"  # it and this project read it differently
GIVE_UP_AFTER = 20  # failures in a row: then the judge or function is at fault, not the images


@dataclasses.dataclass(frozen=True)
class Item:
  """One prompt of a benchmark."""

  benchmark: str  # name
  id: str  # stable and unique within the benchmark; "/" may separate its parts
  prompt: str
  images: int  # generated from it
  extra: dict  # the official record, with the fields that `read_items` adds


@dataclasses.dataclass(frozen=True)
class Official:
  """Judge of a benchmark's own scripts: the model in words, and decoding settings."""

  judge: str
  temperature: float
  max_tokens: int


class Benchmark:
  """One benchmark. Subclasses set the attributes and override the methods that differ.

  Attributes may also come from files/NAME.toml, see `facts`.
  """

  name = title = ""  # on the command line, and in reports
  packaged: pathlib.Path | None = None  # its prompt file; None: --prompts is required
  published_counts: dict[str, int] = {}  # number of items by task
  grid = False  # the images of a prompt are the cells of one 2 x 2 grid
  right = None  # (item, image) -> bool, of benchmarks that need no judge and no detector
  each_image = False  # images are scored one by one; prompts without images count as missing
  # In the report: columns and decimal places, {row, of PUBLISHED: {column or category: figure}},
  # and sentences to read before comparing with published figures.
  columns: tuple[str, ...] = ()
  places = 3
  published: dict = {}
  published_categories: dict = {}
  caveats: tuple[str, ...] = ()
  # The judge: None where there is none; {name: (Template, fields that a replacement must have)}.
  official: Official | None = None
  templates: dict = {}
  # On the command line: flags of `irg eval score`, {"--flag": {"help", "metavar", ...}}, where
  # metavar N stands for a whole number, X for a number, FILE and DIR for a path. For --help: images
  # of a prompt, what --tasks takes, where scores come from, values of --prompts and --checkpoint,
  # further flags of `score`, and {step: command lines after "irg eval STEP NAME"}.
  flags: dict[str, dict] = {}
  images_help = tasks_help = sources = ""
  example_prompts, example_checkpoint, example_score = "", "weights/irg-7b", ""
  more_examples: dict[str, tuple[str, ...]] = {}

  def __init__(self):
    vars(self).update(facts(self.name))

  def read(self, path=None) -> list[Item]:
    """Reads and checks the official prompt files, in their order.

    `path` is a file or folder as published; None: the file that comes with this package.
    ValueError names the file, the line and the fault.
    """
    if path is None and self.packaged is None:
      raise ValueError(f"--prompts: give the path of your copy of {self.name}'s prompts")
    path = storage.path(self.packaged if path is None else path)
    if not path.exists():
      raise ValueError(f"--prompts {path}: no such file or folder")
    items = self.read_items(path)
    if not items:
      raise ValueError(f"--prompts {path}: holds no prompts")
    for item in items:
      if broken := re.search("[\ud800-\udfff]", item.prompt):
        raise ValueError(f"--prompts {path}: the prompt of {item.id} has a lone surrogate at "
                         f"character {broken.start()}; write the whole character")
    return items

  def read_items(self, path: pathlib.Path) -> list[Item]:
    """Reads the items of an existing file or folder; see `read`."""
    raise NotImplementedError

  def tasks(self, item: Item) -> tuple[str, ...]:
    """The names by which `--tasks` selects an item."""
    return (item.id.split("/")[0],)

  def counts(self, size: int) -> dict[str, int]:
    """Published number of items by task, for a set of about `size` items."""
    return self.published_counts

  def check_counts(self, items: list[Item]) -> None:
    """Raises ValueError unless the items are the whole published set; names the first count."""
    have = collections.Counter(task for item in items for task in self.tasks(item))
    for task, wanted in self.counts(len(items)).items():
      if have[task] != wanted:
        raise ValueError(f"--prompts: {have[task]} prompts of {task}, but {self.name} as published "
                         f"has {wanted}; with --subset they are taken as they are")

  def select(self, items: list[Item], tasks=None, limit: int | None = None) -> list[Item]:
    """The items of some tasks, the first `limit` of them; ValueError for an unknown task."""
    known = dict.fromkeys(task for item in items for task in self.tasks(item))
    if unknown := [task for task in tasks or () if task not in known]:
      raise ValueError(f"--tasks {unknown[0]}: no such task{messages.guess(unknown[0], known)}; "
                       f"there are {', '.join(known) or f'none ({self.tasks_help})'}")
    return [i for i in items if not tasks or set(tasks) & set(self.tasks(i))][:limit]

  def image_path(self, item: Item, image: int, round: int) -> pathlib.PurePath:
    """Path of an image below the run's folder, where the official scorer expects it.

    Images count from 0, those of a grid share a path. Rounds count from 1, see `round_root`.
    """
    raise NotImplementedError

  def beside(self, item: Item, round: int) -> dict[pathlib.PurePath, bytes]:
    """Files that the official scorer expects beside the images of a prompt, by path."""
    return {}

  def questions(self, item: Item, path, round: int, references=None, templates=None):
    """Yields the `questions.Question`s about the image (or grid) of a prompt and round at `path`.

    `references` is what the benchmark reads from its question files, `templates` {name: Template}
    in place of the built-in ones.
    """
    raise NotImplementedError

  def question(self, item: Item, image, round: int, name: str, templates, fields: dict,
               wording: str = "", **options):
    """The `questions.Question` of a name about an image: a path, or a `questions.Cell`.

    Args:
      templates: {name: Template} in place of the built-in ones, or None.
      fields: to fill into the template.
      wording: the name of the template, if it is not the benchmark's.
      options: more of `Question`.
    """
    wording = wording or self.name
    user, system = ((templates or {}).get(wording) or self.templates[wording][0]).fill(**fields)
    key = questions.key(self.name, item.id, getattr(image, "index", 0), round, name)
    return questions.Question(key, (image,), user, system, **{
        "max_tokens": self.official.max_tokens} | options)

  def score(self, folder, options, open_judge) -> dict:
    """Scores a `score.ImageFolder`, writes scores.json and items.jsonl, returns the former.

    `options` are the parsed flags, `open_judge` () -> context manager of a `questions.OpenJudge`.
    ValueError names a flag or file that is missing or unfit.
    """
    raise NotImplementedError

  def headline(self, summary: dict) -> dict[str, float | None]:
    """Figures of a round's summary for the main table, by column."""
    return {self.columns[0]: summary["overall"]}

  def categories(self, summary: dict) -> dict[str, float | None]:
    """A round's figures by category, the overall last."""
    raise NotImplementedError

  def scored(self, summary: dict) -> int:
    """Number of images or prompts of a round that have a score."""
    return summary["items"]


def facts(name: str) -> dict:
  """The attributes that a benchmark's files/NAME.toml has; none where there is no such file."""
  path = FILES / f"{name}.toml"
  found = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  if "official" in found:
    found["official"] = Official(**found["official"])
  if "templates" in found:
    found["templates"] = {n: (questions.Template(t["user"], t.get("system", "")), t["fields"])
                          for n, t in found["templates"].items()}
  return found


def seed(benchmark: str, item_id: str, image: int) -> int:
  """Seed of an image, 0 to 2**32 - 1: a function of these three arguments alone."""
  digest = hashlib.sha256(json.dumps([benchmark, item_id, image]).encode()).digest()
  return int.from_bytes(digest[:4], "big")


def round_root(round: int) -> pathlib.PurePath:
  """The folder to hand to the official scorer; rounds count from 1."""
  return pathlib.PurePath(f"round{round}")


def trace_path(item: Item, image: int) -> pathlib.PurePath:
  """Path of an image's trace. An image with a trace is done: its files are written before."""
  return pathlib.PurePath("traces", item.id, f"{image}.json")


def read_trace(out, item: Item, image: int) -> dict | None:
  """The trace of an image, or None where it is not done.

  {"benchmark", "id", "picture", "prompt", "seed", "rounds": [{"think": str or None,
  "think_tokens", "hit_limit", "tokens_cut", "picture": path under `out`, or None if it
  failed, "seconds": of the whole batch by phase}]}
  """
  path = storage.path(out) / trace_path(item, image)
  try:
    trace = storage.read_json(path)
    kinds = {"think": str | None, "picture": str | None, "seconds": dict}
    if not all(isinstance(entry[name], kind) for entry in trace["rounds"]
               for name, kind in kinds.items()):
      raise TypeError("fields of other types")
    return trace
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, LookupError) as e:
    if isinstance(e, OSError) and not storage.is_local(path):
      raise  # the store's fault, not the trace's
    raise ValueError(f"{path}: not a trace ({type(e).__name__}: {e}); remove it to generate its "
                     "images again") from e


def listing(folder):
  """A function: whether a file, by its path in `folder`, is there; in a bucket, as of now.

  There, asking about each of thousands of files takes minutes, and listing them seconds.
  """
  folder = storage.path(folder)
  if storage.is_local(folder):
    return lambda path: (folder / path).is_file()
  names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
  return lambda path: pathlib.PurePath(path).as_posix() in names


class Mean:
  """A running mean, added up in order of arrival, as the official scripts do."""

  def __init__(self):
    self.sum, self.count = 0.0, 0

  def add(self, value) -> None:
    self.sum += value
    self.count += 1

  def value(self) -> float | None:
    """The mean; None where nothing was added."""
    return self.sum / self.count if self.count else None


class Unscored:
  """Items without a score, counted by reason; the first `limit` of them are named."""

  def __init__(self, limit: int = 20):
    self.counts = {}  # {reason: number of items}
    self.examples, self._limit = [], limit  # [{"item", "reason", "detail"}]

  def add(self, item: str, reason: str, detail: str = "") -> None:
    """Counts an item; `reason` is a short constant phrase, `detail` what was found."""
    self.counts[reason] = self.counts.get(reason, 0) + 1
    if len(self.examples) < self._limit:
      self.examples.append({"item": item, "reason": reason, "detail": detail[:200]})

  def add_if(self, irregular: bool, item: str, answer) -> None:
    """Counts a scored answer, if it is not in the official form."""
    if irregular:
      self.add(item, IRREGULAR, answer.text)

  def total(self) -> int:
    return sum(self.counts.values())

  def summary(self) -> dict:
    return {"total": self.total(), "by_reason": dict(self.counts), "examples": self.examples}


class GroupMeans:
  """The mean over prompts of the mean of each prompt's values, overall and by group."""

  def __init__(self):
    self.unscored, self._groups = Unscored(), collections.defaultdict(Mean)

  def add(self, group: str, number: str, values) -> float | None:
    """Adds a prompt's values and returns their mean; unscored without values, or with a None."""
    values = list(values)
    if not values or None in values:
      self.unscored.add(f"{group}_{number}", "a cell has no score" if values else
                        "no cell to score")
      return None
    self._groups[group].add(score := sum(values) / len(values))
    return score

  def value(self) -> dict:
    total = sum(mean.sum for mean in self._groups.values())
    count = sum(mean.count for mean in self._groups.values())
    return {"score": total / count if count else None, "prompts": count,
            "folders": {name: mean.value() for name, mean in self._groups.items()},
            "unscored": self.unscored.summary()}


def mean(values) -> float | None:
  """The mean of the values that are not None; None where there is none."""
  found = [v for v in values if v is not None]
  return sum(found) / len(found) if found else None


def is_number(value) -> bool:
  """Whether `value` is a finite number; true, null and NaN of a JSON file are not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
