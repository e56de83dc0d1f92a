"""One `irg eval score`: every picture's score, streamed, and a summary of each round.

  OUT/scores.json   summaries by round, with the run's settings and the judge's
  OUT/items.jsonl   a line a prompt and round (GenEval, mini: an image): scores, or why there is
                    none, and the judge's words

Both are written aside and appear whole. A score that cannot be had is a reason, never a number.
"""

import contextlib
import dataclasses
import json
import pathlib
import re

from irg_jax.evaluate import geneval
from irg_jax.evaluate import layout
from irg_jax.evaluate import prompts
from irg_jax.evaluate import run_folder
from irg_jax.evaluate import tally

SCORES, ITEMS = run_folder.SCORES, "items.jsonl"
_ROUND = re.compile(r"round([1-9]\d*)")
_GENEVAL_FILE = re.compile(r"(?:round([1-9]\d*)/)?(\d+)/samples/(\d+)\.png")


@dataclasses.dataclass(frozen=True)
class Run:
  """A folder of images to score.

  Attributes:
    out: folder of `irg eval generate`, or one in its layout.
    benchmark: whose.
    items: the prompts to score: of GenEval and mini all, else those with an image in any round.
    rounds: numbers of the rounds that are there, from 1.
    record: what run.json says, or {} where there is none.
    absent: prompts of the file without any image; they are counted, not asked about.
    whole: the file has as many prompts as published.
  """

  out: pathlib.Path
  benchmark: str
  items: tuple
  rounds: tuple[int, ...]
  record: dict
  absent: int = 0
  whole: bool = True


def open_run(benchmark: str, out, prompts_path=None) -> Run:
  """Looks at a folder; reads the prompts.

  Raises:
    ValueError: no such folder, no rounds in it, or it is of another benchmark.
  """
  out = pathlib.Path(out)
  if not out.is_dir():
    raise ValueError(f"--out {out}: no such folder; it is what irg eval generate wrote")
  record = {}
  if (out / "run.json").is_file():
    record = run_folder.read_run(out)
    if (found := record["settings"].get("benchmark", benchmark)) != benchmark:
      raise ValueError(f"--out {out}: holds images of {found}, not of {benchmark}")
  rounds = sorted(int(m[1]) for p in out.iterdir() if (m := _ROUND.fullmatch(p.name)))
  if not rounds:
    raise ValueError(f"--out {out}: has no round1, round2, ...; it is what irg eval generate wrote")
  every = prompts.read(benchmark, prompts_path)
  _check_same_prompts(record, every, out)
  items = [item for item in every if benchmark in layout.SAMPLES or _drawn(out, item, rounds)]
  return Run(out, benchmark, tuple(items), tuple(rounds), record, len(every) - len(items),
             _is_whole(every))


def _is_whole(items):
  try:
    prompts.check_counts(items)
  except ValueError:
    return False
  return True


def _drawn(out, item, rounds):
  return any((out / layout.image_path(item.benchmark, item, p, r)).is_file()
             for r in rounds for p in range(item.images))


def _check_same_prompts(record, items, out):
  """Pictures of other prompts would be scored without complaint, so run.json is asked."""
  count = record.get("settings", {}).get("prompts", {}).get("count", len(items))
  if count != len(items):
    raise ValueError(f"--prompts: has {len(items)} prompts, but {out} was drawn from {count}; give "
                     "the same path as to irg eval generate")


def score_answers(run: Run, make_scorer, groups, extra: dict) -> dict:
  """Scores a stream of answers and writes both files.

  Args:
    make_scorer: () -> one of `scorers`; a round gets one of its own, so none are pooled.
    groups: iterable of (item, round, answers); a prompt and round comes once.
    extra: more entries for scores.json; those that are functions are called at the end.

  Returns:
    The content of scores.json.

  Raises:
    ValueError: a prompt and round comes twice.
  """
  rounds = {number: make_scorer() for number in run.rounds}
  done = {number: set() for number in run.rounds}  # of prompts, so it does not grow with cells
  with _writing(run.out / ITEMS) as write:
    for item, number, answers in groups:
      if item.id in done[number]:
        raise ValueError(f"{item.id}, round {number}: answers came twice")
      done[number].add(item.id)
      result = rounds[number].add(item, answers)
      write(_line(item, number, 0, item.images) | result)
  return _finish(run, {n: scorer.value() for n, scorer in rounds.items()},
                 {n: run.absent + len(run.items) - len(ids) for n, ids in done.items()}, extra)


def score_images(run: Run, make_scorer, images, extra: dict) -> dict:
  """Scores a stream of images, each by itself, and writes both files.

  Args:
    make_scorer: () -> an object with `add(item, path)` and `value()`, like those of `scorers`.
    images: iterable of (item, round, image); each comes once.
    extra: more entries for scores.json.
  """
  rounds = {number: make_scorer() for number in run.rounds}
  missing = dict.fromkeys(run.rounds, sum(item.images for item in run.items))
  with _writing(run.out / ITEMS) as write:
    for item, number, image in images:
      missing[number] -= 1
      line = _line(item, number, image, 1)
      write(line | rounds[number].add(item, run.out / line["file"]))
  return _finish(run, {n: scorer.value() for n, scorer in rounds.items()}, missing, extra)


def images_there(run: Run):
  """(item, round, image) of every image of the prompts to score that is there."""
  for number in run.rounds:
    for item in run.items:
      for image in range(item.images):
        if (run.out / layout.image_path(run.benchmark, item, image, number)).is_file():
          yield item, number, image


def _line(item, number, image, in_file):
  """The beginning of a line of items.jsonl."""
  path = layout.image_path(item.benchmark, item, image, number)
  return {"id": item.id, "round": number, "picture": image, "in_file": in_file,
          "prompt": item.prompt, "tasks": list(prompts.tasks(item)), "file": str(path)}


def read_detections(paths):
  """Yields (where, record or None) of files of detections, a line at a time."""
  for path in paths:
    for number, record in tally.read_lines(path):
      yield f"{path}, line {number}", record


def score_detections(run: Run, records, options: geneval.Options, extra: dict,
                     default_round: int | None = None) -> dict:
  """GenEval: scores a stream of (where, record of detections; see `geneval`), each once.

  An image is known by its file name, [roundN/]00000/samples/00000.png; without roundN it is of
  `default_round`. An image that comes a second time is counted as such, and not again.

  Raises:
    ValueError: a name without a round, and no `default_round`.
  """
  by_id = {item.id: item for item in run.items}
  rounds = {number: _GenEvalRound() for number in run.rounds}
  with _writing(run.out / ITEMS) as write:
    for where, record in records:
      _add_image(rounds, by_id, record, where, options, default_round, write)
  expected = sum(item.images for item in run.items)
  summaries = {n: r.value() for n, r in rounds.items()}
  missing = {n: expected - r.seen_count() for n, r in rounds.items()}
  return _finish(run, summaries, missing, extra)


class _GenEvalRound:
  """A round's summary, what has no verdict, and which images came: a bit each."""

  def __init__(self):
    self.summary, self.unscored = geneval.Summary(), tally.Unscored()
    self._seen = {}

  def is_new(self, item_id, image):
    bit, seen = 1 << image, self._seen.get(item_id, 0)
    self._seen[item_id] = seen | bit
    return not seen & bit

  def seen_count(self):
    return sum(bits.bit_count() for bits in self._seen.values())

  def value(self):
    return self.summary.value() | {"unscored": self.unscored.summary()}


def _add_image(rounds, by_id, record, where, options, default_round, write):
  name = str(record.get("filename", "")) if record else ""
  match = _GENEVAL_FILE.search(name)
  number = int(match[1]) if match and match[1] else default_round or min(rounds)
  if match and not match[1] and default_round is None and len(rounds) > 1:
    raise ValueError(f"{where}: {name} does not say of which round it is; score one round at a "
                     "time with --round N")
  if number not in rounds:
    raise ValueError(f"{where}: {name} is of round {number}, which the run does not have")
  target = rounds[number]
  item = by_id.get(match[2]) if match else None
  image = int(match[3]) if match else 0
  if record is None or item is None or image >= item.images:
    return target.unscored.add(where, "not JSON" if record is None else "no such picture", name)
  if not target.is_new(item.id, image):
    return target.unscored.add(name, "came twice")
  result = _verdict(target, item, record, name, options)
  write(_line(item, number, image, 1) | result)


def _verdict(target, item, record, name, options):
  try:
    if "metadata" in record and _plain(record["metadata"]) != item.extra:
      raise geneval.Unscorable("detected for another prompt", str(record["metadata"])[:100])
    if error := record.get("error"):
      reason, _, detail = str(error).partition(": ")
      raise geneval.Unscorable(reason, detail)
    result = geneval.score_image(record | {"metadata": item.extra}, options, details=False)
  except geneval.Unscorable as e:
    target.unscored.add(name, e.reason, e.detail)
    return {"scores": {}, "why": str(e), "words": None}
  target.summary.add(result)
  return {"scores": {"correct": int(result["correct"])}, "why": None,
          "words": result["reason"] or "correct"}


def _plain(metadata):
  if not isinstance(metadata, str):
    return metadata
  try:
    return json.loads(metadata)
  except ValueError:
    return None


def _finish(run, summaries, missing, extra):
  rounds = {}
  for number, summary in summaries.items():
    unscored = summary["unscored"]["total"]
    rounds[str(number)] = summary | {
        "missing": missing[number], "complete": run.whole and not (missing[number] or unscored)}
  result = {
      "benchmark": run.benchmark,
      "prompts": len(run.items) + run.absent,
      "rounds": rounds,
      "run": run.record,
      **{name: value() if callable(value) else value for name, value in extra.items()},
  }
  with run_folder.new_text(run.out / SCORES) as file:
    json.dump(result, file, indent=1, ensure_ascii=False)
    file.write("\n")
  return result


@contextlib.contextmanager
def _writing(path):
  """Yields a function that adds a JSON line; the file appears when all are there."""
  with run_folder.new_text(path) as file:
    yield lambda value: file.write(json.dumps(value, ensure_ascii=False) + "\n")
