"""From a judge's answers about one prompt's images to scores, benchmark by benchmark.

A scorer takes one prompt of one round at a time, `add(item, answers)`, and keeps sums only. What
it returns is that prompt's line of items.jsonl:

  {"scores": {name: number}, "why": reason for no score or None, "words": what the judge said}

`answers` maps (cell, question) to an Answer-like value with `text`, `error` and `probability`;
the images of most prompts are one, cell 0. An answer that is absent, has an error or cannot be
parsed gives no score: it is counted by reason in the summary, and never becomes a number.
"""

from irg_jax.evaluate import genai_bench
from irg_jax.evaluate import oneig
from irg_jax.evaluate import tally
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise

# The names of the questions, where an image is asked about once.
WISE, TIIF, VQA, TEXT = "scores", "answers", "vqascore", "text"


class Wise:
  """Three scores an image; see `wise.Summary`."""

  def __init__(self):
    self._summary = wise.Summary()
    self._unscored = tally.Unscored()

  def add(self, item, answers) -> dict:
    answer = answers.get((0, WISE))
    if why := failure(answer):
      return self._none(item, answer, why)
    scores = wise.parse(answer.text)
    if absent := [f for f in wise.FIELDS if f not in scores]:
      return self._none(item, answer, f"unparsable: no {', no '.join(absent)}")
    record = {"prompt_id": item.extra["prompt_id"], **scores}
    self._summary.add(record)
    return line(answer, scores | {"WiScore": wise.item_score(record)})

  def value(self) -> dict:
    return self._summary.value() | {"unscored": self._unscored.summary()}

  def _none(self, item, answer, why):
    self._unscored.add(item.id, *_parts(why))
    return line(answer, {}, why)


class Tiif:
  """Yes or no to each of a prompt's questions.

  `references` maps (type, line) to (questions, right answers).
  """

  def __init__(self, references: dict):
    self._references = references
    self._summary = tiif.Summary()

  def add(self, item, answers) -> dict:
    answer, (questions, expected) = answers.get((0, TIIF)), self._reference(item)
    if not (why := failure(answer)):
      try:
        predicted = tiif.parse(answer.text, len(questions))
      except tiif.Unparsable as e:
        why = f"unparsable: {e}"
    if why:
      self._summary.unscored.add(item.id, *_parts(why))
      return line(answer, {}, why)
    self._summary.add(item.extra["attribute"], item.extra["length"], expected, predicted)
    right = [e.strip().lower() == p for e, p in zip(expected, predicted)]
    result = line(answer, {"accuracy": sum(right) / len(right)})
    result["questions"] = [[q, e, p] for q, e, p in zip(questions, expected, predicted)]
    return result

  def value(self) -> dict:
    return self._summary.value()

  def _reference(self, item):
    key = item.extra["attribute"], item.extra["line"]
    if key not in self._references:
      raise ValueError(f"--questions: no questions for line {key[1]} of {key[0]} (from 0)")
    return self._references[key]


class GenAIBench:
  """One number an image: VQAScore, how likely the judge's "yes" is, from 0 to 1."""

  def __init__(self, skills: dict):
    self._skills, self._scores = skills, {}
    self._unscored = tally.Unscored()

  def add(self, item, answers) -> dict:
    answer = answers.get((0, VQA))
    why, score = failure(answer), getattr(answer, "probability", None)
    if not why and not (tally.is_number(score) and 0 <= score <= 1):
      why = "unparsable: no probability of yes" if score is None else f"out of range: {score}"
    if why:
      self._unscored.add(item.id, *_parts(why))
      return line(answer, {}, why)
    self._scores[item.id] = score
    return line(answer, {"VQAScore": score})

  def value(self) -> dict:
    return (genai_bench.aggregate(self._scores, self._skills)
            | {"unscored": self._unscored.summary()})


class OneIG:
  """Five parts; a prompt's folder says which of them it takes part in.

  `references` has "questions": {folder: `oneig.read_questions`}, and "texts": {id: words}; None
  where no judge is asked.
  """

  def __init__(self, references: dict | None):
    self._references = references
    self._parts = {name: oneig.PromptMeans() for name in oneig.PARTS if name != "text"}
    self._parts["text"] = oneig.TextSummary()
    self.irregular = tally.Unscored()  # scored, as 0, but neither Yes nor No

  def add(self, item, answers) -> dict:
    folder, number = item.id.split("/")
    cells = sorted({cell for cell, _ in answers if isinstance(cell, int)})
    scores, words = {}, {}
    judged = "text" if folder == "text" else "alignment" if folder in oneig.ALIGNED else None
    if judged and self._references is None:
      self._parts[judged].unscored.add(item.id, "not asked")
      scores[judged] = None
    elif judged == "alignment":
      scores[judged] = self._alignment(folder, number, cells, answers, words)
    elif judged == "text":
      self._text(number, cells, answers, scores, words)
    self._measured(item, folder, number, answers, scores)
    missing = [name for name, score in scores.items() if score is None]
    why = f"no score: {', '.join(missing)}" if missing else None
    found = {name: score for name, score in scores.items() if score is not None}
    return {"scores": found, "why": why, "words": words or None}

  def value(self) -> dict:
    parts = {name: self._parts[name].value() for name in oneig.PARTS}
    unscored = {"total": sum(p["unscored"]["total"] for p in parts.values()),
                "by_reason": {f"{name}: {reason}": count for name, part in parts.items()
                              for reason, count in part["unscored"]["by_reason"].items()},
                "examples": [e for p in parts.values() for e in p["unscored"]["examples"]][:20]}
    return {"overall": oneig.overall({name: part["score"] for name, part in parts.items()}),
            "parts": parts, "irregular": self.irregular.summary(), "unscored": unscored}

  def _alignment(self, folder, number, cells, answers, words):
    table = self._references["questions"][folder]
    if number not in table:
      self._parts["alignment"].unscored.add(f"{folder}_{number}", "no questions in Q_D")
      return None
    questions, dependency = table[number]
    values = []
    for cell in cells:
      found = {n: answers.get((cell, f"alignment{n}")) for n in questions}
      values.append(None if any(map(failure, found.values())) else self._cell(
          f"{folder}/{number} cell {cell}", found, dependency))
      words[str(cell)] = {questions[n]: getattr(a, "text", None) for n, a in found.items()}
    return self._parts["alignment"].add(folder, number, values)

  def _cell(self, where, found, dependency):
    for n, answer in found.items():
      if answer.text not in ("Yes", "No"):
        self.irregular.add(f"{where} question {n}", "neither Yes nor No", answer.text)
    return oneig.alignment_cell({n: oneig.says_yes(a.text) for n, a in found.items()}, dependency)

  def _text(self, number, cells, answers, scores, words):
    if number not in (texts := self._references["texts"]):
      self._parts["text"].unscored.add(f"text_{number}", "no text in text_content.csv")
      scores["text"] = None
      return
    found = [answers.get((cell, TEXT)) for cell in cells]
    values = [None if failure(a) else oneig.text_cell(texts[number], a.text) for a in found]
    words.update({str(c): getattr(a, "text", None) for c, a in zip(cells, found)})
    rates = self._parts["text"].add(number, values)
    scores.update(zip(("ED", "CR", "WAC"), rates) if rates else {"text": None})

  def _measured(self, item, folder, number, answers, scores):
    """Parts that a model measures, not a judge: (part, "values") holds a number a cell or pair."""
    for name in ("reasoning", "style", "diversity"):
      if not takes_part(name, folder, item):
        continue
      values = answers.get((name, "values"))
      if name == "diversity" and values == []:
        continue  # fewer than two images: no pair, and upstream passes over it
      if values is None:
        self._parts[name].unscored.add(f"{folder}_{number}", "no measurement")
        scores[name] = None
      else:
        scores[name] = self._parts[name].add(folder, number, values)


def takes_part(part: str, folder: str, item) -> bool:
  """Whether a prompt belongs to a part of OneIG that a model measures."""
  if part == "style":
    return folder == "anime" and bool(item.extra.get("class", "").strip())
  return part == "diversity" or folder == part


def failure(answer) -> str | None:
  """Why an answer is none: "reason: detail"; None where it is one."""
  if answer is None:
    return "no answer"
  return answer.error or None


def line(answer, scores: dict, why: str | None = None) -> dict:
  return {"scores": scores, "why": why, "words": getattr(answer, "text", None)}


def _parts(why):
  reason, _, detail = why.partition(": ")
  return reason, detail
