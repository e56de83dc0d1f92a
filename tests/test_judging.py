"""A judge's answers about a run's images become its scores, benchmark by benchmark."""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from judge_server import FAULTS, JudgeServer, prompt_of
import numpy as np
from PIL import Image
import pytest

from irg_jax import commands
from irg_jax import evaluate
from irg_jax.commands import eval as eval_verb
from irg_jax.evaluate import genai_bench
from irg_jax.evaluate import judge as judge_lib
from irg_jax.evaluate import oneig
from irg_jax.evaluate import questions
from irg_jax.evaluate import score
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise
from irg_jax.evaluate.base import Item
from irg_jax.evaluate.judge import Judge
from irg_jax.evaluate.questions import JudgeSettings

pytest.importorskip("openai", reason="the judge's client needs the extra `eval`")

TIIF = {("color+2d", line): ([f"<{line}> a?", "b?"], ["yes", "no"]) for line in range(4)}
ONEIG = {"questions": {"anime": {"000": ({1: "<1> fox?", 2: "<2> red?"}, {1: [0], 2: [1]})},
                       "human": {}, "object": {}}, "texts": {"000": "['OPEN LATE']"}}
ITEMS = {
    "wise": [Item("wise", str(i), f"<{i}>", 1, {"prompt_id": i, "Explanation": "e"})
             for i in range(1, 13)],
    "tiif": [Item("tiif", f"color+2d/{length}/{line}", "x", 1,
                  {"attribute": "color+2d", "length": length, "line": line})
             for length in ("short", "long") for line in range(4)],
    "genai_bench": [Item("genai_bench", f"{i:05}", f"<{i}>", 1, {}) for i in range(8)],
    "oneig": [Item("oneig", f"{f}/000", "x", 4, {"class": ""}) for f in ("anime", "text")],
}
SKILLS = {"basic": [0, 1, 2, 3], "advanced": [4, 5, 6, 7]}


def make_run(out, benchmark):
  """Pictures in two rounds, all different; of the last item of round 2 there is none."""
  items, dice = ITEMS[benchmark], np.random.default_rng(0)
  for number in (1, 2):
    for item in items:
      path = out / evaluate.get(benchmark).image_path(item, 0, number)
      if (number, item) != (2, items[-1]):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(1, 255, (8, 8, 3), dtype=np.uint8)).save(path)
  return score.ImageFolder(out, evaluate.get(benchmark), tuple(items), (1, 2), {})


def make_wise(folder):
  """`make_run` of WISE in `folder`/images, and its prompt file, wise.json."""
  make_run(folder / "images", "wise")
  prompts = [item.extra | {"Prompt": item.prompt, "Explanation": "e", "Subcategory": "s",
                           "Category": "CULTURE"} for item in ITEMS["wise"]]
  (folder / "wise.json").write_text(json.dumps(prompts))


def answer(body):
  """The answer to any question, decided by the question alone."""
  text = prompt_of(body)
  number = int((re.search(r"<(\d+)>", text) or [0, "0"])[1])
  if "Consistency" in text:
    return f"Consistency: {number % 3}\nRealism: {number % 2}\nAesthetic Quality: 2"
  if body.get("logprobs"):
    yes = 0.1 + number / 10
    top = [{"token": t, "logprob": float(np.log(p))} for t, p in (("Yes", yes), ("No", 1 - yes))]
    return {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}
  if "2 questions" in text:
    return "yes, it is\nno" if number % 2 else "no\nno"
  return "OPEN LATE" if "read" in text else "Yes"


SCORERS = {"wise": wise.Scorer, "tiif": lambda: tiif.Scorer(TIIF),
           "genai_bench": lambda: genai_bench.Scorer(SKILLS), "oneig": lambda: oneig.Scorer(ONEIG)}
REFERENCES = {"tiif": TIIF, "oneig": ONEIG}


def score_with(server, run, **changes):
  settings = JudgeSettings(server.url, "m", **{"first_wait": 0.001, "tries": 12} | changes)
  with Judge(settings, run.out / "judge_cache.sqlite") as judge:
    groups = ((item, r, found | {("diversity", "values"): []})  # that part has no judge
              for item, r, found in score.judged(run, judge.ask, REFERENCES.get(run.benchmark.name)))
    return score.score_answers(run, SCORERS[run.benchmark.name], groups, {}), judge.account


@pytest.mark.parametrize("benchmark", list(ITEMS))
def test_a_faulty_judge_changes_no_score_and_each_prompt_counts_once(tmp_path, benchmark):
  dice = random.Random(benchmark)
  plan = [dice.choice((*FAULTS, *[None] * len(FAULTS))) for _ in range(3000)]
  with JudgeServer(answer) as server:
    want, _ = score_with(server, make_run(tmp_path / "good", benchmark))
  run = make_run(tmp_path / "bad", benchmark)
  with JudgeServer(answer, lambda n, _: plan[n]) as server:
    got, account = score_with(server, run)
    again, free = score_with(server, run)
    assert free.calls == 0
  want = json.loads(json.dumps(want).replace("/good/", "/bad/"))  # names a missing image
  assert got == want == again and account.faults.total() > 0
  first, second = got["rounds"]["1"], got["rounds"]["2"]
  assert first["complete"] and first["unscored"]["total"] == 0
  assert second["unscored"]["total"] == 1 and not second["complete"]
  lines = [json.loads(line) for line in (run.out / score.ITEMS).read_text().splitlines()]
  assert [(e["id"], e["round"]) for e in lines] == [
      (item.id, r) for r in (1, 2) for item in run.items]
  assert all(bool(e["scores"]) or e is lines[-1] for e in lines)


def test_killed_at_any_moment_and_started_again_it_writes_the_files_of_one_run(tmp_path):
  killed, whole = make_run(tmp_path / "killed", "wise"), make_run(tmp_path / "whole", "wise")
  script = tmp_path / "run.py"
  tests = pathlib.Path(__file__).parent
  script.write_text(_KILLED.format(tests=str(tests), out=str(killed.out)))
  with JudgeServer(answer, seconds=0.02) as server:
    for count in random.Random(5).sample(range(2, 9), 2):
      sent = len(server.bodies)
      process = subprocess.Popen([sys.executable, str(script), server.url],
                                 env=os.environ | {"PYTHONPATH": str(tests.parent)})
      while len(server.bodies) < sent + count and process.poll() is None:
        time.sleep(0.001)
      assert process.poll() is None, "it ended before it was killed"
      process.send_signal(signal.SIGKILL)
      process.wait()
      assert not (killed.out / score.SCORES).exists()
    _, account = score_with(server, killed)
    # What was under way at the kills, two requests each time, may be asked again; nothing else.
    assert len(server.bodies) <= 23 + 2 * 2 and account.cached > 0
    score_with(server, whole)
  for name in (score.SCORES, score.ITEMS):
    texts = [(run.out / name).read_text() for run in (killed, whole)]
    assert texts[0].replace("/killed/", "/whole/") == texts[1]  # a missing image has its path


_KILLED = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import test_judging as t
class Server:
  url = sys.argv[1]
run = t.score.ImageFolder(pathlib.Path({out!r}), t.wise.WISE, tuple(t.ITEMS["wise"]), (1, 2), {{}})
t.score_with(Server, run, concurrency=2)
"""


def test_a_scoring_function_is_asked_once_a_image_and_its_failures_are_reported(tmp_path):
  run, calls = make_run(tmp_path, "genai_bench"), []
  def function(path, prompt):
    calls.append(path)
    return {"<2>": 1.5, "<3>": float("nan")}.get(prompt, 0.25)
  def scored():
    groups = score.measured_by(run, function, "mine", tmp_path / "cache.sqlite", "vqascore")
    return score.score_answers(run, SCORERS["genai_bench"], groups, {})
  first = scored()
  assert len(calls) == 15 and first["rounds"]["1"]["tags"]["advanced"]["score"] == 0.25
  assert first["rounds"]["1"]["unscored"]["by_reason"] == {"scorer": 2}
  assert first["rounds"]["2"]["unscored"]["by_reason"] == {"scorer": 2, "picture": 1}
  assert scored() == first and len(calls) == 15 + 4  # only what has no score is asked again


def opened(monkeypatch, benchmark, *words):
  """The settings and the `OpenJudge` that the command makes of flags."""
  made = []
  class Stub(contextlib.nullcontext):
    lost, account, ask = 0, "", None
    def __init__(self, settings, cache):
      super().__init__(self)
      made.append(settings)
  monkeypatch.setattr(judge_lib, "Judge", Stub)
  parser = argparse.ArgumentParser()
  eval_verb._add_judge(parser.add_argument)
  args = parser.parse_args(words)
  args.out = pathlib.Path("out")
  with eval_verb._open_judge(args, evaluate.get(benchmark)) as judge:
    return made[0], judge


NAMED = ("--judge-url", "http://host/v1", "--judge-model", "m")


def test_the_official_temperature_holds_unless_a_flag_says_otherwise(monkeypatch):
  temperature = lambda *words: opened(monkeypatch, *words)[0].temperature
  temperatures = [temperature(b, *NAMED) for b in ITEMS]
  assert dict(zip(ITEMS, temperatures)) == {"wise": 0, "tiif": 1, "genai_bench": 1, "oneig": 0}
  assert temperature("tiif", *NAMED, "--temperature", "0") == 0


def test_a_missing_judge_is_named_with_the_official_one(monkeypatch):
  with pytest.raises(ValueError, match="--judge-url.*Qwen2.5-VL-72B"):
    opened(monkeypatch, "tiif")
  with pytest.raises(ValueError, match="--judge-model.*gpt-4o"):
    opened(monkeypatch, "wise", "--judge-url", "http://host/v1")


def test_a_wording_of_ones_own_is_used_and_recorded(tmp_path, monkeypatch):
  path = tmp_path / "words.json"
  path.write_text('{"user": "{question}!"}')
  words = questions.chosen_templates(oneig.ONEIG, [f"alignment={path}"])
  assert words == {"oneig_alignment": questions.Template("{question}!")}
  _, judge = opened(monkeypatch, "oneig", *NAMED, "--template", f"alignment={path}")
  assert judge.templates == words
  recorded = judge.record["templates"]
  assert recorded["oneig_alignment"]["user"] == "{question}!" and len(recorded) == 2
  run = make_run(tmp_path / "run", "oneig")
  with JudgeServer(answer) as server:
    with Judge(JudgeSettings(server.url, "m"), tmp_path / "cache.sqlite") as judge:
      list(score.judged(run, judge.ask, ONEIG, words))
    assert {prompt_of(b) for b in server.bodies} >= {"<1> fox?!", "<2> red?!"}
  for name in (f"sideways={path}", str(path)):
    with pytest.raises(ValueError, match="oneig knows alignment, text"):
      questions.chosen_templates(oneig.ONEIG, [name])


KEY = "sk-test-9sQxZr71LmWc"


def test_the_command_stops_at_a_wrong_key_and_accounts_for_every_question(
    tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  run = make_run(tmp_path / "out", "wise")
  (tmp_path / "final_data.json").write_text(json.dumps([
      {"Prompt": item.prompt, "Category": "c", "Subcategory": "s", **item.extra}
      for item in run.items]))
  with JudgeServer(lambda body: f"{answer(body)}\nBearer {KEY}", lambda n, _: "401") as server:
    words = ["eval", "score", "wise", "--out", str(run.out), "--prompts", str(tmp_path),
             "--judge-url", server.url, "--judge-model", "m", "--concurrency", "2", "--tries", "4"]
    root = str(pathlib.Path(__file__).resolve().parents[1])
    refused = subprocess.run(  # of its own, for a traceback and the client's log
        [sys.executable, "-m", "irg_jax", *words], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": root, "IRG_DEBUG": "1", "OPENAI_LOG": "debug"})
    assert len(server.bodies) <= 2 and refused.returncode != 0
    assert "refuses the key (401): set OPENAI_API_KEY" in refused.stderr
    assert "Traceback" in refused.stderr and "Building HTTP request" in refused.stderr
    assert not (run.out / score.SCORES).exists()
    server.faults = lambda n, _: "500" if n % 4 == 0 else None
    assert commands.main(words) == 0
    done = capfd.readouterr()
    assert "judge: 24 questions: 0 from the cache, 23 answered, 1 without" in done.out
    assert "(1 picture)" in done.out and "server (5xx)" in done.out
    assert commands.main(words) == 0
  again = capfd.readouterr()
  assert "23 from the cache, 0 answered, 1 without an answer (1 picture); 0 calls" in again.out
  assert KEY not in "".join((refused.stdout, refused.stderr, *done, *again))
  for path in tmp_path.rglob("*"):
    assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
