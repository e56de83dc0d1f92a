"""From a folder of images to answers, for `score.score_answers`: the judge, or a function.

Both yield (item, round, {(cell, question): Answer}), every item of every round once.
"""

import hashlib
import math
import pathlib

from irg_jax.evaluate import layout
from irg_jax.evaluate import questions
from irg_jax.evaluate import scorers
from irg_jax.evaluate import templates
from irg_jax.evaluate.judge_types import Answer
from irg_jax.evaluate.record_log import RecordLog

SCORE_CACHE = "vqascore_cache.jsonl"  # the usual name

_GIVE_UP_AFTER = 20


def judged(run, judge, references=None, wording=None, grid=(2, 2)):
  """The judge's answers about the images of a `score.Run`, round by round.

  Args:
    judge: an open `judge.Judge`.
    references: TIIF: what `questions.read_tiif_questions` gave; OneIG: {"questions": {folder:
      what `oneig.read_questions` gave}, "texts": what `questions.read_oneig_texts` gave}.
    wording: {key of `templates.BUILT_IN`: Template}; those that it lacks are the built-in ones.
    grid: OneIG's columns and rows.
  """
  words = {name: built_in for name, (built_in, _) in templates.BUILT_IN.items()} | (wording or {})
  extra = {
      "wise": lambda: {"template": words["wise"]},
      "tiif": lambda: {"questions": references, "template": words["tiif"]},
      "genai_bench": lambda: {"template": words["genai_bench"]},
      "oneig": lambda: {**references, "grid": grid, "alignment": words["oneig_alignment"],
                        "text": words["oneig_text"]},
  }[run.benchmark]()
  ask_about = {"wise": questions.wise, "tiif": questions.tiif, "oneig": questions.oneig,
               "genai_bench": questions.genai_bench}[run.benchmark]
  requests_of = lambda item, round: ask_about(item, _path(run, item, round), round, **extra)
  yield from questions.answers(run.items, run.rounds, judge.ask, requests_of)


def measured(run, function, name: str, cache_path):
  """GenAI-Bench by a function of the user's own: (path, prompt) -> score from 0 to 1.

  The official one is t2v_metrics' VQAScore with clip-flant5-xxl (t2v_metrics up to 3.0). What it
  said is kept by the picture's content, so that a run that was stopped goes on.

  Raises:
    ValueError: image after image failed.
  """
  failures = 0
  with RecordLog(cache_path, "digest") as log:
    for round in run.rounds:
      for item in run.items:
        answer = _measure(item, round, _path(run, item, round), function, name, log)
        failed = answer.error and not answer.error.startswith("picture")
        failures = failures + 1 if failed else 0
        if failures >= _GIVE_UP_AFTER:
          raise ValueError(f"{name} failed at {failures} images in a row: {answer.error}")
        yield item, round, {(0, scorers.VQA): answer}


def _path(run, item, round):
  return pathlib.Path(run.out / layout.image_path(run.benchmark, item, 0, round))


def _measure(item, round, path, function, name, log):
  answer = lambda **fields: Answer(questions.key("genai_bench", item.id, 0, round, scorers.VQA),
                                   model=name, **fields)
  try:
    image = hashlib.sha256(path.read_bytes()).hexdigest()
  except OSError as e:
    return answer(error=f"picture: {path}: {e.strerror or e}")
  digest = hashlib.sha256(repr((name, item.prompt, image)).encode()).hexdigest()
  if (kept := log.get(digest)) is not None:
    return answer(probability=kept["score"], cached=True)
  try:
    score = float(function(path, item.prompt))
  except Exception as e:  # a foreign function: one image that it cannot do is not the end
    return answer(error=f"scorer: {type(e).__name__}: {e}")
  if not 0 <= score <= 1 or math.isnan(score):
    return answer(error=f"scorer: {score} is not from 0 to 1")
  log.append({"digest": digest, "picture": str(path), "model": name, "score": score})
  return answer(probability=score)
