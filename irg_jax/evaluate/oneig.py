"""OneIG-Bench, English: five parts, each from what a model says of the cells of 2 x 2 grids.

alignment: a VLM's yes/no to questions that depend on each other; text: a VLM's transcription
against the words asked for; reasoning: similarity of image and answer; style: similarity to
images of the style; diversity: distance between the cells. The overall is their plain mean.
Each part has its own pure functions and `Summary`.
"""

import collections
import json
import re

import numpy as np

from irg_jax.evaluate import tally
from irg_jax.evaluate import tiif

PARTS = ("alignment", "text", "reasoning", "style", "diversity")
FOLDERS = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object",
           "Text_Rendering": "text", "Knowledge_Reasoning": "reasoning"}
ALIGNED = ("anime", "human", "object")
MAX_EDIT_DISTANCE = 100  # of the English half

_DROPPED = ("addCriterion", "No text recognized.")
_LETTERS = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_NOT_KEPT = re.compile(rf"[^{_LETTERS}\s]")
_CHINESE = re.compile("[\u4e00-\u9fff]")


def split_grid(image: np.ndarray, columns: int = 2, rows: int = 2) -> list[np.ndarray]:
  """The cells of a grid [H, W, 3], row by row; black cells, failed images, are left out.

  Sizes are floored, so pixels that are over at the right and the bottom belong to no cell.
  """
  height, width = image.shape[0] // rows, image.shape[1] // columns
  cells = [image[r * height : (r + 1) * height, c * width : (c + 1) * width]
           for r in range(rows) for c in range(columns)]
  return [cell for cell in cells if cell.any()]


def parse_grid(text: str) -> tuple[int, int]:
  """Columns and rows of "2,2", or of "2" as older releases write it."""
  if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)?", text.replace(" ", "")):
    raise ValueError(f"grid {text!r}: write columns,rows such as 2,2")
  numbers = [int(n) for n in text.split(",")]
  return numbers[0], numbers[-1]


def read_questions(path) -> dict[str, tuple[dict, dict]]:
  """{prompt id: ({question number: text}, {question number: [parents]})} of a Q_D file.

  Raises:
    ValueError: an entry is malformed; names the file and the prompt id.
  """
  with open(path, encoding="utf-8") as file:
    table = json.load(file)
  result = {}
  for key, entry in table.items():
    try:
      questions, dependency = (
          {int(n): v for n, v in (json.loads(e) if isinstance(e, str) else e).items()}
          for e in (entry["question"], entry["dependency"]))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      raise ValueError(f"{path}: prompt {key}: question and dependency must be objects by number "
                       f"({e})") from e
    if set(questions) != set(dependency):
      raise ValueError(f"{path}: prompt {key}: questions and dependencies differ in number")
    result[key] = questions, dependency
  return result


def says_yes(text: str) -> bool:
  """The official reading: exactly "Yes", so neither "yes" nor "Yes."."""
  return text == "Yes"


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
  if _CHINESE.search(text):
    return re.sub(r"\s+", "", text)
  return re.sub(r"\s+", " ", text).strip()


def clean_transcription(text: str) -> str:
  """Without the two phrases that the transcribing model adds."""
  for phrase in _DROPPED:
    text = text.replace(phrase, "")
  return text


def transcription_limit(expected: str) -> int:
  """Tokens that a transcription may have, by the words that the ground truth has."""
  return 256 if len(expected.split()) > 60 else 128


def text_cell(expected: str, transcription: str) -> dict:
  """{"distance", "exact", "matched" words, "words" expected} of one cell, of raw texts."""
  want = normalize_text(expected)
  got = normalize_text(clean_transcription(transcription))
  units = list if _CHINESE.search(want) else str.split
  common = collections.Counter(units(want)) & collections.Counter(units(got))
  distance = tiif.edit_distance(got, want)
  return {"distance": distance, "exact": distance == 0, "matched": common.total(),
          "words": len(units(want))}


def style_cell(csd: float, encoder: float) -> float:
  """Mean of the two largest similarities to a style's references; negative ones count as 0."""
  return (max(csd, 0) + max(encoder, 0)) / 2


def largest_similarity(embedding, references) -> float:
  """Largest dot product of an embedding [D] with references [N, D], all of length one.

  float32, as the official models answer, added from left to right: no library decides the last
  digit.
  """
  products = np.asarray(references, np.float32) * np.asarray(embedding, np.float32)
  return float(np.cumsum(products, axis=1, dtype=np.float32)[:, -1].max())


def style_name(name: str) -> str:
  """A class of the prompt file as the reference embeddings name it."""
  return name.lower().replace(" ", "_")


class PromptMeans:
  """Mean over prompts of the mean over a prompt's cells: alignment, reasoning, style, diversity."""

  def __init__(self):
    self.unscored = tally.Unscored()
    self._folders = collections.defaultdict(tally.Mean)

  def add(self, folder: str, number: str, values) -> float | None:
    """Takes a prompt's values (a cell, or a pair of cells, each) and returns their mean.

    None among the values, or no value at all, makes a prompt without a score.
    """
    values = list(values)
    if not values or any(v is None for v in values):
      reason = "a cell has no score" if values else "no cell to score"
      self.unscored.add(f"{folder}_{number}", reason)
      return None
    score = sum(values) / len(values)
    self._folders[folder].add(score)
    return score

  def value(self) -> dict:
    total, count = sum(m.sum for m in self._folders.values()), self.count
    return {"score": total / count if count else None, "prompts": count,
            "folders": {name: m.value() for name, m in self._folders.items()},
            "unscored": self.unscored.summary()}

  @property
  def count(self):
    return sum(m.count for m in self._folders.values())


class TextSummary:
  """The text part: three rates over all cells, then one score."""

  def __init__(self, max_edit_distance: int = MAX_EDIT_DISTANCE):
    self.unscored = tally.Unscored()
    self._limit = max_edit_distance
    self._distance, self._exact = tally.Mean(), tally.Mean()
    self._matched = self._words = self._prompts = 0

  def add(self, number: str, cells: list[dict | None]) -> list[float] | None:
    """Takes a prompt's `text_cell`s; returns its mean distance, exactness and word accuracy."""
    if not cells or any(cell is None for cell in cells):
      self.unscored.add(f"text_{number}", "a cell has no transcription" if cells
                        else "no cell to score")
      return None
    for cell in cells:
      self._distance.add(cell["distance"])
      self._exact.add(cell["exact"])
      self._matched += cell["matched"]
      self._words += cell["words"]
    self._prompts += 1
    accuracy = [c["matched"] / c["words"] if c["words"] else 0.0 for c in cells]
    rows = ([c["distance"] for c in cells], [c["exact"] for c in cells], accuracy)
    return [sum(row) / len(cells) for row in rows]

  def value(self) -> dict:
    distance, exact = self._distance.value(), self._exact.value()
    accuracy = self._matched / self._words if self._words else None
    score = None
    if distance is not None and accuracy is not None:
      lost = min(self._limit, distance) * (1 - exact) * (1 - accuracy)
      score = 1 - lost / self._limit
    return {"score": score, "ED": distance, "CR": exact, "WAC": accuracy,
            "prompts": self._prompts, "unscored": self.unscored.summary()}


def overall(parts: dict[str, float | None]) -> float | None:
  """Plain mean of the five parts; None while one of them has no score."""
  values = [parts.get(name) for name in PARTS]
  return None if any(v is None for v in values) else sum(values) / len(values)
