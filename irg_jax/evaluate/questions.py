"""What a judge is asked about which image, for each benchmark that has a judge.

A function a benchmark: one prompt's image (or grid) of one round in, `judge.Request`s out.
`answers` strings them together and hands the judge's answers back by prompt. A request's key is

  BENCHMARK/ITEM ID/pCELL/rROUND/QUESTION        such as oneig/anime/000/p2/r1/alignment7

CELL is a number from 0, ROUND one from 1; an image that is no grid is cell 0.
"""

import collections
import csv
import dataclasses
import pathlib
import re

from irg_jax.evaluate import judge_images
from irg_jax.evaluate import oneig as oneig_scores
from irg_jax.evaluate import prompt_files
from irg_jax.evaluate import scorers
from irg_jax.evaluate import templates
from irg_jax.evaluate import tiif as tiif_scores
from irg_jax.evaluate import wise as wise_scores
from irg_jax.evaluate.judge_types import Request

_KEY = re.compile(r"([a-z_]+)/(.+)/p(\d+)/r(\d+)/([^/]+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Official:
  """How a benchmark's own evaluation asks, in words for help and reports, and in numbers."""

  judge: str
  temperature: float
  max_tokens: int


# Temperatures and limits are the official scripts'; greedy decoding is temperature 0.
OFFICIAL = {
    "wise": Official("gpt-4o-2024-05-13 (BAGEL's and IRG's script: gpt-4o-2024-11-20)", 0.0, 2000),
    "tiif": Official("Qwen2.5-VL-72B-Instruct, or gpt-4o", 1.0, 4096),
    "genai_bench": Official("clip-flant5-xxl of t2v_metrics up to 3.0 (VQAScore)", 1.0, 1),
    "oneig": Official("Qwen2.5-VL-7B-Instruct for alignment and text", 0.0, 16),
}


def key(benchmark: str, item_id: str, cell: int, round: int, question: str) -> str:
  """The key of a question about a cell of an image."""
  return f"{benchmark}/{item_id}/p{cell}/r{round}/{question}"


def split_key(text: str) -> tuple[str, str, int, int, str]:
  """Benchmark, item id, cell, round and question of a key."""
  match = _KEY.fullmatch(text)
  if not match:
    raise ValueError(f"{text!r} is not a key of an answer")
  return match[1], match[2], int(match[3]), int(match[4]), match[5]


def answers(items, rounds, ask, requests_of):
  """Yields (item, round, {(cell, question): Answer}), round by round; one for every item.

  Args:
    ask: `Judge.ask`, or what does as it does.
    requests_of: (item, round) -> iterable of requests, possibly none.
  """
  open_groups = collections.deque()

  def stream():
    for round in rounds:
      for item in items:
        requests = list(requests_of(item, round))
        open_groups.append((item, round, len(requests), {}))
        yield from requests

  for answer in ask(stream()):
    while not open_groups[0][2]:
      yield _group(open_groups)
    found = open_groups[0][3]
    _, _, cell, _, question = split_key(answer.key)
    found[cell, question] = answer
    if len(found) == open_groups[0][2]:
      yield _group(open_groups)
  while open_groups:
    yield _group(open_groups)


def wise(item, path, round: int, template=templates.WISE):
  """One request; its answer has the three scores."""
  user, system = template.fill(prompt=item.prompt, explanation=item.extra["Explanation"])
  yield Request(key("wise", item.id, 0, round, scorers.WISE), (path,), user, system,
                OFFICIAL["wise"].max_tokens, _wise_fault)


def tiif(item, path, round: int, questions: dict, template=templates.TIIF):
  """One request, with all questions of the prompt.

  Args:
    questions: what `read_tiif_questions` gave.
  """
  asked = [q.strip() for q in questions[_tiif_line(item)][0]]
  user, system = template.fill(questions="\n".join(asked), count=len(asked))
  yield Request(key("tiif", item.id, 0, round, scorers.TIIF), (path,), user, system,
                OFFICIAL["tiif"].max_tokens, _tiif_fault(len(asked)))


def genai_bench(item, path, round: int, template=templates.GENAI_BENCH):
  """One request; the answer's `probability` is the score."""
  user, system = template.fill(prompt=item.prompt)
  yield Request(key("genai_bench", item.id, 0, round, scorers.VQA), (path,), user, system,
                OFFICIAL["genai_bench"].max_tokens, probability=True)


def oneig(item, path, round: int, questions: dict, texts: dict, grid=(2, 2),
          alignment=templates.ONEIG_ALIGNMENT, text=templates.ONEIG_TEXT):
  """A request for each cell with an image and question, or with a text to transcribe.

  Args:
    questions: {folder: what `oneig.read_questions` gave}.
    texts: what `read_oneig_texts` gave.
    grid: columns and rows.
  """
  folder, number = item.id.split("/")
  asked = {}  # question: (its words, tokens of an answer, what is no answer)
  if folder in oneig_scores.ALIGNED:
    for n, question in questions[folder].get(number, ({}, {}))[0].items():
      asked[f"alignment{n}"] = (alignment.fill(question=question), OFFICIAL["oneig"].max_tokens,
                                _yes_or_no_fault)
  elif folder == "text" and number in texts:
    asked[scorers.TEXT] = text.fill(), oneig_scores.transcription_limit(texts[number]), None
  for cell in judge_images.cells(path, *grid) if asked else ():
    for name, ((user, system), max_tokens, fault) in asked.items():
      yield Request(key("oneig", item.id, cell.index, round, name), (cell,), user, system,
                    max_tokens, fault)


def read_tiif_questions(folder, items) -> dict[tuple[str, int], tuple[list[str], list[str]]]:
  """{(type, line): (questions, right answers)} for the items, from the official question files.

  Args:
    folder: testmini_eval_prompts (or test_eval_prompts), beside the prompts.

  Raises:
    ValueError: a file or line is missing or malformed; names it.
  """
  found = {}
  for kind in dict.fromkeys(item.extra["attribute"] for item in items):
    path = pathlib.Path(folder) / f"{kind}_eval_prompts.jsonl"
    if not path.is_file():
      raise ValueError(f"--questions {folder}: no file {path.name} in there; give the folder "
                       "testmini_eval_prompts (or the one that belongs to your prompts)")
    for line, entry in enumerate(prompt_files.json_lines(path)):
      found[kind, line] = _questions_and_answers(entry)
  for item in items:
    if _tiif_line(item) not in found:
      kind, line = _tiif_line(item)
      raise ValueError(f"{folder}: {kind}_eval_prompts.jsonl has no line {line + 1}, for the "
                       f"prompt {item.id}; do prompts and questions belong together?")
  return found


def read_oneig_texts(path) -> dict[str, str]:
  """{prompt id: the raw text to draw} of the official text_content.csv.

  Raises:
    ValueError: names the file and the line.
  """
  texts = {}
  with open(path, encoding="utf-8-sig", newline="") as file:
    rows = csv.DictReader(file)
    if not {"id", "text_content"} <= set(rows.fieldnames or ()):
      raise ValueError(f"{path}: needs the columns id and text_content")
    for row in rows:
      number = (row["id"] or "").zfill(3)
      if not re.fullmatch(r"\d{3}", number) or row["text_content"] is None:
        raise ValueError(f"{path}, line {rows.line_num}: needs an id of three digits and a text")
      if number in texts:
        raise ValueError(f"{path}, line {rows.line_num}: id {number} is there twice")
      texts[number] = row["text_content"]
  return texts


def _group(open_groups):
  item, round, _, found = open_groups.popleft()
  return item, round, found


def _questions_and_answers(entry):
  lists = [prompt_files.field(entry, name, list) for name in ("yn_question_list",
                                                               "yn_answer_list")]
  questions, answers = lists
  if not questions or len(questions) != len(answers):
    raise ValueError(f"{entry.where}: {len(questions)} questions and {len(answers)} answers")
  if bad := [v for v in questions + answers if not isinstance(v, str) or not v.strip()]:
    raise ValueError(f"{entry.where}: {bad[0]!r} is not a text")
  if bad := [a for a in answers if a.strip().lower() not in ("yes", "no")]:
    raise ValueError(f"{entry.where}: the answer {bad[0]!r} is neither yes nor no")
  return questions, answers


def _tiif_line(item):
  return item.extra["attribute"], item.extra["line"]


def _wise_fault(text):
  missing = [f for f in wise_scores.FIELDS if f not in wise_scores.parse(text)]
  return f"no score for {' and '.join(missing)}" if missing else None


def _tiif_fault(count):
  def fault(text):
    try:
      tiif_scores.parse(text, count)
    except tiif_scores.Unparsable as e:
      return str(e)
    return None
  return fault


def _yes_or_no_fault(text):
  """Looser than the score, which takes "Yes" alone for a yes: what is wrong here has no answer."""
  return None if re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) else "neither yes nor no"
