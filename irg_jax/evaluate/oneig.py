"""OneIG-Bench, English: the plain mean of five parts, over the cells of 2 x 2 grids.

The judge gives alignment (yes or no to questions that depend on each other) and text (its
transcription against the words asked for). Other models measure reasoning (similarity of image and
answer), style (similarity to images of the style) and diversity (distance between cells):

  {"round": 1, "part": "reasoning", "id": "reasoning/000", "values": [0.21, ...]}   a cell each
  {"round": 1, "part": "style", "id": "anime/004", "values": [[0.5, 0.6], ...]}     CSD, encoder
  {"round": 1, "part": "diversity", "id": "text/000", "values": [0.31, ...]}        a pair each

The official models are LLM2CLIP-Openai-L-14-336 (reasoning), CSD and OneIG-StyleEncoder (style: the
largest similarity to the references of the style) and DreamSim (diversity). Black cells have no
value; a grid with fewer than two images has an empty list of pairs.

  --prompts    OneIG-Bench.csv, or its folder
  --questions  the folder `scripts` of its repository, or one with Q_D and text_content.csv
  item ids     "anime/000": folder, id
  images       roundN/images/anime/irg_jax/000.webp, four images in a 2 x 2 grid
"""

import collections
import re

from rapidfuzz.distance import Levenshtein

from irg_jax import storage
from irg_jax.evaluate import answers as answers_lib
from irg_jax.evaluate import base, questions, records, score

PARTS = ("alignment", "text", "reasoning", "style", "diversity")
FOLDERS = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object",
           "Text_Rendering": "text", "Knowledge_Reasoning": "reasoning"}
ALIGNED = ("anime", "human", "object")
COUNTS = {"anime": 245, "human": 244, "object": 206, "text": 200, "reasoning": 225}
MAX_EDIT_DISTANCE = 100  # of the English half

_DROPPED = ("addCriterion", "No text recognized.")  # which the transcribing model adds
_NOT_KEPT = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ\s]")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_CHINESE_HALF = ("is the Chinese half, which is scored otherwise and not supported; give "
                 "OneIG-Bench.csv")


def says_yes(text: str) -> bool:
  """The official reading: exactly "Yes", so neither "yes" nor "Yes."."""
  return text == "Yes"


YES = questions.Form(lambda text: answers_lib.yes_no(text) == "yes", says_yes)
WORDS = questions.Form(answers_lib.spoken, lambda text: text)  # a transcription


def alignment_cell(answers: dict[int, bool], dependency: dict[int, list[int]]) -> float:
  """Share of questions that hold; one with a parent that does not hold counts as not holding.

  Only direct parents count, by their own answer: no chains. Parent 0 stands for none.
  """
  holds = [answers[n] and all(answers.get(p, True) for p in parents if p)
           for n, parents in dependency.items()]
  return sum(holds) / len(holds)


def normalize_text(text: str) -> str:
  """Letters, digits and single spaces; case stays. Spaces go, too, where there is Chinese."""
  text = _NOT_KEPT.sub("", text)
  return re.sub(r"\s+", "" if _CHINESE.search(text) else " ", text).strip()


def transcription_limit(expected: str) -> int:
  """Tokens that a transcription may have, by the words that the ground truth has."""
  return 256 if len(expected.split()) > 60 else 128


def text_cell(expected: str, transcription: str) -> dict:
  """{"distance", "exact", "matched" words, "words" expected} of one cell, of raw texts."""
  want = normalize_text(expected)
  for phrase in _DROPPED:
    transcription = transcription.replace(phrase, "")
  got = normalize_text(transcription)
  units = list if _CHINESE.search(want) else str.split
  common = collections.Counter(units(want)) & collections.Counter(units(got))
  distance = Levenshtein.distance(got, want)
  return {"distance": distance, "exact": distance == 0, "matched": common.total(),
          "words": len(units(want))}


def style_cell(csd: float, encoder: float) -> float:
  """Mean of the two largest similarities to a style's references; negative ones count as 0."""
  return (max(csd, 0) + max(encoder, 0)) / 2


class TextSummary:
  """The text part: three rates over all cells, then one score."""

  def __init__(self):
    self.unscored, self._prompts, self._sums = base.Unscored(), 0, collections.Counter()

  def add(self, number: str, cells: list[dict | None]) -> list[float] | None:
    """Adds a prompt's `text_cell`s; returns its mean distance, exactness and word accuracy."""
    if not cells or any(cell is None for cell in cells):
      self.unscored.add(f"text_{number}", "a cell has no transcription" if cells
                        else "no cell to score")
      return None
    self._prompts += 1
    for cell in cells:
      self._sums.update(cell, cells=1)
    rows = [(c["distance"], c["exact"], c["matched"] / c["words"] if c["words"] else 0.0)
            for c in cells]
    return [sum(column) / len(cells) for column in zip(*rows)]

  def value(self) -> dict:
    rate = lambda name, of: self._sums[name] / self._sums[of] if self._sums[of] else None
    distance, exact = rate("distance", "cells"), rate("exact", "cells")
    accuracy, score = rate("matched", "words"), None
    if distance is not None and accuracy is not None:
      lost = min(MAX_EDIT_DISTANCE, distance) * (1 - exact) * (1 - accuracy)
      score = 1 - lost / MAX_EDIT_DISTANCE
    return {"score": score, "ED": distance, "CR": exact, "WAC": accuracy,
            "prompts": self._prompts, "unscored": self.unscored.summary()}


def _within(low, value, high):
  """Returns `value`; ValueError if it is out of range, as percentages are."""
  if base.is_number(value) and not low <= value <= high:
    raise ValueError(f"{value} is not from {low:.3g} to {high:.3g}")
  return value


# Parts that other models measure: an entry of their values to a number. Similarities may be a
# little above 1, by rounding.
MEASURED = {"reasoning": lambda value: _within(-1.01, value, 1.01),
            "style": lambda pair: style_cell(*(_within(-1.01, value, 1.01) for value in pair)),
            "diversity": lambda value: _within(-0.01, value, 2.01)}


def overall(parts: dict[str, float | None]) -> float | None:
  """Plain mean of the five parts; None while one of them has no score."""
  values = [parts.get(name) for name in PARTS]
  return None if any(v is None for v in values) else sum(values) / len(values)


class Scorer:
  """Adds up a round's answers in five parts; see `score`. `references` None: no judge is asked."""

  def __init__(self, references: dict | None, strict: bool = False):
    self._references, self._strict = references, strict
    self._parts = {name: TextSummary() if name == "text" else base.GroupMeans() for name in PARTS}
    self.irregular = base.Unscored()

  def add(self, item, answers) -> dict:
    folder, number = item.id.split("/")
    cells = sorted({cell for cell, _ in answers if isinstance(cell, int)})
    scores, words = {}, {}
    judged = {"text": self._text} | dict.fromkeys(ALIGNED, self._alignment)
    if folder in judged and self._references is None:
      scores = self._none("text" if folder == "text" else "alignment", item.id, "not asked")
    elif folder in judged:
      scores = judged[folder](folder, number, cells, answers, words)
    styled = folder == "anime" and item.extra.get("class", "").strip()
    for name, takes_part in (("reasoning", folder == "reasoning"), ("style", styled),
                             ("diversity", True)):
      values = answers.get((name, "values"))
      # Fewer than two images have no pair; upstream passes over them.
      if takes_part and not (name == "diversity" and values == []):
        scores |= ({name: self._parts[name].add(folder, number, values)} if values is not None
                   else self._none(name, f"{folder}_{number}", "no measurement"))
    missing = [name for name, value in scores.items() if value is None]
    return {"scores": {name: value for name, value in scores.items() if value is not None},
            "why": f"no score: {', '.join(missing)}" if missing else None, "words": words or None}

  def value(self) -> dict:
    parts = {name: self._parts[name].value() for name in PARTS}
    unscored = {"total": sum(p["unscored"]["total"] for p in parts.values()),
                "by_reason": {f"{name}: {reason}": count for name, part in parts.items()
                              for reason, count in part["unscored"]["by_reason"].items()},
                "examples": [e for p in parts.values() for e in p["unscored"]["examples"]][:20]}
    return {"overall": overall({name: part["score"] for name, part in parts.items()}),
            "parts": parts, "irregular": self.irregular.summary(), "unscored": unscored}

  def _none(self, part, where, reason):
    self._parts[part].unscored.add(where, reason)
    return {part: None}

  def _alignment(self, folder, number, cells, answers, words):
    table, values = self._references["questions"][folder], []
    if number not in table:
      return self._none("alignment", f"{folder}_{number}", "no questions in Q_D")
    asked, dependency = table[number]
    for cell in cells:
      found = {n: answers.get((cell, f"alignment{n}")) for n in asked}
      words[str(cell)] = {asked[n]: getattr(a, "text", None) for n, a in found.items()}
      read = {n: self._take(YES, f"{folder}/{number} cell {cell} question {n}", a)
              for n, a in found.items()}
      values.append(None if None in read.values() else alignment_cell(read, dependency))
    return {"alignment": self._parts["alignment"].add(folder, number, values)}

  def _take(self, form, where, answer):
    value, _, irregular = form.take(answer, self._strict)
    self.irregular.add_if(irregular, where, answer)
    return value

  def _text(self, folder, number, cells, answers, words):
    if number not in (texts := self._references["texts"]):
      return self._none("text", f"{folder}_{number}", "no text in text_content.csv")
    found = [answers.get((cell, "text")) for cell in cells]
    words |= {str(c): getattr(a, "text", None) for c, a in zip(cells, found)}
    read = [self._take(WORDS, f"{folder}/{number} cell {c}", a) for c, a in zip(cells, found)]
    values = [None if said is None else text_cell(texts[number], said) for said in read]
    rates = self._parts["text"].add(number, values)
    return dict(zip(("ED", "CR", "WAC"), rates)) if rates else {"text": None}


def read_questions(path) -> dict[str, tuple[dict, dict]]:
  """{prompt id: ({question number: text}, {question number: [parents]})} of a Q_D file."""
  try:
    table = storage.read_json(path)
  except ValueError as e:
    raise ValueError(f"{path}: not JSON of questions by prompt ({e})") from e
  by_number = lambda entry: {int(n): value for n, value in (
      storage.parse_json(entry) if isinstance(entry, str) else entry).items()}
  result = {}
  for key, entry in table.items():
    try:
      asked, dependency = by_number(entry["question"]), by_number(entry["dependency"])
      dependency = {n: [int(p) for p in parents] for n, parents in dependency.items()}
      if not all(isinstance(question, str) for question in asked.values()):
        raise ValueError("a question is no text")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      raise ValueError(f"{path}: prompt {key}: question and dependency must be objects by number "
                       f"({e})") from e
    if set(asked) != set(dependency):
      raise ValueError(f"{path}: prompt {key}: questions and dependencies differ in number")
    result |= {key: (asked, dependency)} if asked else {}
  return result


def read_texts(path) -> dict[str, str]:
  """{prompt id: raw text of the image} of text_content.csv; ValueError names file and line."""
  entries = records.csv_rows(path, ("id", "text_content"))
  numbers = [_checked_id(entry, entry.record["id"].zfill(3)) for entry in entries]
  records.check_unique(entries, [f"id {number}" for number in numbers])
  return {number: entry.record["text_content"] for number, entry in zip(numbers, entries)}


def read_references(folder) -> dict:
  """The questions by folder, and the texts, of the official repository's folder `scripts`."""
  if not folder:
    raise ValueError("--questions: give the folder scripts of a copy of OneIG-Benchmark")
  return {"questions": {name: read_questions(_find(folder, f"Q_D/{name}.json"))
                        for name in ALIGNED},
          "texts": read_texts(_find(folder, "text_content.csv"))}


class OneIG(base.Benchmark):
  """The protocol of OneIG-Bench."""

  name, title, grid = "oneig", "OneIG-Bench, English", True
  published_counts, columns = COUNTS, ("OneIG-EN",)

  def read_items(self, path):
    columns = ("category", "id", "prompt_en", "type", "prompt_length", "class")
    file = records.file_in(path, "OneIG-Bench.csv")
    if file.stem.upper().endswith("ZH"):
      raise ValueError(f"--prompts {file}: {_CHINESE_HALF}")
    entries = records.csv_rows(file, columns)
    for entry in entries:
      if len(_CHINESE.findall(entry.record["prompt_en"])) * 2 > len(entry.record["prompt_en"]):
        raise ValueError(f"{entry.where}: {_CHINESE_HALF}")
      if entry.record["category"] not in FOLDERS:
        raise ValueError(f"{entry.where}: unknown category {entry.record['category']!r}; the "
                         f"categories are {', '.join(FOLDERS)}")
      _checked_id(entry, entry.record["id"])
      records.field(entry, "prompt_en", str)
    records.check_unique(entries, [f"{e.record['category']} {e.record['id']}" for e in entries])
    return [base.Item(self.name, f"{FOLDERS[e.record['category']]}/{e.record['id']}",
                      e.record["prompt_en"], 4, e.record) for e in entries]

  def image_path(self, item, image, round):
    folder, number = item.id.split("/")
    return base.round_root(round) / "images" / folder / base.MODEL / f"{number}.webp"

  def questions(self, item, path, round, references=None, templates=None):
    """Yields the alignment questions, or the one for the text, of each cell with an image.

    `references`: those of `read_references`, and "grid": (columns, rows).
    """
    folder, number = item.id.split("/")
    asked = {}  # name: further arguments of `question`
    if folder in ALIGNED:
      for n, question in references["questions"][folder].get(number, ({}, {}))[0].items():
        asked[f"alignment{n}"] = {"fields": {"question": question}, "wording": "oneig_alignment",
                                  **YES.faults()}
    elif folder == "text" and number in references["texts"]:
      limit = transcription_limit(references["texts"][number])
      asked["text"] = {"fields": {}, "max_tokens": limit, "wording": "oneig_text",
                       **WORDS.faults()}
    for cell in questions.cells(path, *references.get("grid", (2, 2))) if asked else ():
      for name, arguments in asked.items():
        yield self.question(item, cell, round, name, templates, **arguments)

  def score(self, folder, options, open_judge):
    if not options.judge_url and not options.measurements:
      raise ValueError("oneig needs --judge-url (alignment, text), --measurements (reasoning, "
                       "style, diversity), or both")
    grid, measured, references = questions.parse_grid(options.grid), options.measurements, None
    table = score.read_measurements(measured, MEASURED) if measured else {}
    if options.judge_url:
      references = read_references(options.questions) | {"grid": grid}
    make = lambda: Scorer(references, options.strict_official)
    return score.score_judged(
        folder, make, open_judge if references else None, references,
        {"protocol": {"grid": options.grid, "measurements": str(measured or "none")}}, table)

  def categories(self, summary):
    scores = {name: summary["parts"][name]["score"] for name in PARTS}
    return scores | {"overall": summary["overall"]}

  def scored(self, summary):
    return sum(part["prompts"] for part in summary["parts"].values())


ONEIG = OneIG()


def _checked_id(entry, number):
  if not re.fullmatch(r"\d{3}", number):
    raise ValueError(f"{entry.where}: id {number!r} must be three digits")
  return number


def _find(folder, name):
  """A file of the official scripts, in their subfolders or in one folder."""
  for path in (folder / part / name for part in ("alignment", "text", ".")):
    if path.is_file():
      return path
  raise ValueError(f"--questions {folder}: no {name} in there, nor in alignment or text below it")
