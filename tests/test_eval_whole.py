"""A benchmark from prompts to the paper's table, as processes that are killed and started again."""

import collections
import json
import math
import pathlib
import random
import signal
import time
import zlib

from judge_server import FAULTS, JudgeServer, cached, prompt_of
import pytest

from irg_jax import commands
from irg_jax.evaluate import genai_bench as genai_scores
from train_runs import process

pytest.importorskip("openai", reason="the judge's client needs the extra `eval`")

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEY = "sk-test-4hGt82LpQwVn"
KILLS, AT_A_TIME, ASKS = 2, 2, 2


# Made-up prompts in the official formats: the flags of both steps, those of `generate` alone, and
# those of `score` alone.


def geneval(folder):
  lines(folder / "boxes.jsonl", [json.dumps(
      {"filename": f"round{n}/00000/samples/{image:05}.png",
       "detections": {"bench": [{"box": [0, 0, 4, 4], "score": 0.2 * n}] * (image > 0)}})
      for n in (1, 2) for image in range(4)])
  return [], ["--limit", "1"], ["--detections", str(folder / "boxes.jsonl")]


def wise(folder):
  lines(folder / "wise.json", [json.dumps([
      {"Prompt": f"prompt {i}", "Explanation": "why", "Category": "c", "Subcategory": "s",
       "prompt_id": i} for i in (901, 1, 450, 2)])])
  return ["--prompts", str(folder / "wise.json")], ["--subset"], []


def tiif(folder):
  kind = {"type": "color+2d"}
  lines(folder / "prompts" / "color+2d_prompts.jsonl", [json.dumps(
      kind | {"short_description": f"s {i}", "long_description": f"l {i}"}) for i in (0, 1)])
  lines(folder / "asked" / "color+2d_eval_prompts.jsonl", [json.dumps(
      kind | {"yn_question_list": [f"is it {i}?", "is it red?"], "yn_answer_list": ["yes", "no"]})
      for i in (0, 1)])
  return (["--prompts", str(folder / "prompts")], ["--subset"],
          ["--questions", str(folder / "asked")])


def genai_bench(folder):
  lines(folder / "genai_image.json", [json.dumps(
      {f"{i:05}": {"id": f"{i:05}", "prompt": f"prompt {i}", "models": {}} for i in range(4)})])
  lines(folder / "genai_skills.json", [json.dumps(
      {tag: [0, 1, 2, 3] for tag in (*genai_scores.BASIC, *genai_scores.ADVANCED)})])
  return ["--prompts", str(folder / "genai_image.json")], ["--subset"], []


def oneig(folder):
  lines(folder / "OneIG-Bench.csv", [
      "category,id,prompt_en,type,prompt_length,class", "Anime_Stylization,000,a fox,NP,short,",
      "Text_Rendering,000,a sign,NP,short,"])
  asked = {"000": {"question": {"1": "Is it a fox?", "2": "Is it red?"},
                   "dependency": {"1": [0], "2": [1]}}}
  for name in ("anime", "human", "object"):
    lines(folder / "Q_D" / f"{name}.json", [json.dumps(asked if name == "anime" else {})])
  lines(folder / "text_content.csv", ["id,text_content", "000,['OPEN LATE']"])
  return ["--prompts", str(folder / "OneIG-Bench.csv")], ["--subset"], ["--questions", str(folder)]


def lines(path, texts):
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(texts))


def answer(body):
  """Follows from the picture's bytes, so that one other image is another table.

  Nothing can be made of what it says of the prompt or question with a 450 or "is it 1?" in it.
  """
  text, number = prompt_of(body), zlib.crc32(json.dumps(body["messages"][-1]).encode())
  if "450" in text or "is it 1?" in text:
    return "I cannot say."
  if "Consistency" in text:
    return (f"Consistency: {number % 3}\nRealism: {number // 3 % 3}\n"
            f"Aesthetic Quality: {number // 9 % 3}")
  if body.get("logprobs"):
    yes = (1 + number % 98) / 100
    top = [{"token": word, "logprob": math.log(p)} for word, p in (("Yes", yes), ("No", 1 - yes))]
    return {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}
  if "questions" in text:
    return "\n".join("yes" if number >> bit & 1 else "no" for bit in (0, 1))
  return ("OPEN " * (number % 3) if "can be read" in text else ("Yes", "No")[number % 2]) or "LATE"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights")
  assert commands.main(["init", "--config", str(ROOT / "configs" / "tiny.py"),
                   "--out", str(folder / "tiny"), "--config.model.llm.num_layers=1"]) == 0
  return folder


class Steps:
  """The commands of one benchmark, each as a process of its own."""

  def __init__(self, benchmark, cache, generate, score):
    self._commands = {"generate": ["eval", "generate", benchmark, *generate],
                      "score": ["eval", "score", benchmark, *score]}
    self._cache, self.said = cache, []

  def start(self, verb, out):
    return process([*self._commands[verb], "--out", str(out)], self._cache)

  def finish(self, verb, out):
    self._end(self.start(verb, out), 0)

  def kill(self, verb, out, count, enough):
    """Starts it and kills it as soon as `count()` is `enough`, or a moment later."""
    running = self.start(verb, out)
    while count() < enough:
      assert running.poll() is None, running.communicate()[0]
      time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    running.kill()
    self._end(running, -signal.SIGKILL)

  def report(self, out, to):
    self._end(process(["eval", "report", str(out), "--to", str(to)], self._cache), 0)

  def _end(self, running, status):
    self.said.append(running.communicate()[0])
    assert running.returncode == status, self.said[-1]


def content(folder):
  """All files by path, as they are but for this folder's name and the times of traces."""
  found = {}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    data = path.read_bytes().replace(str(folder).encode(), b"HERE")
    if "traces" in path.parts:
      data = json.loads(data)
      for entry in data["rounds"]:
        entry.pop("seconds")
    found[str(path.relative_to(folder))] = data
  return found


@pytest.mark.long
@pytest.mark.parametrize("inputs", [geneval, wise, tiif, genai_bench, oneig])
def test_killed_while_it_draws_and_while_it_asks_it_gives_the_tables_of_a_run_that_was_not(
    inputs, weights, tmp_path, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  common, drawing, scoring = inputs(tmp_path)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  with JudgeServer(answer, seconds=0.3) as server:
    judge = ["--judge-url", server.url, "--judge-model", "m", "--tries", "12", "--concurrency",
             str(AT_A_TIME), "--asks", str(ASKS)] if inputs is not geneval else []
    steps = Steps(
        inputs.__name__, weights / "cache",
        [*common, *drawing, "--checkpoint", str(weights / "tiny"), "--size", "32", "--steps", "3",
         "--think-limit", "4", "--config", str(ROOT / "configs" / "generate_tiny.py")],
        [*common, *scoring, *judge])
    for verb in ("generate", "score"):
      steps.finish(verb, whole / "out")
    asked = server.told.total()
    server.told.clear()
    draw_with_kills(steps, killed / "out")
    if judge:
      judge_with_kills(steps, server, killed / "out")
    steps.finish("score", killed / "out")
    # Asked again: what was under way at a kill, and what had no answer that can be parsed.
    assert asked <= server.told.total() <= asked + KILLS * (AT_A_TIME + 4 * ASKS)
  for root in (whole, killed):
    steps.report(root / "out", root / "report")
  want, got = content(whole), content(killed)
  caches = [sorted(answers_of(root / "out", tree)) for root, tree in ((whole, want), (killed, got))]
  assert caches[0] == caches[1] and len(set(caches[0])) == len(caches[0]) >= 4 * bool(judge)
  assert got.keys() == want.keys() and got == want
  check_every_item_once(want)
  assert not any(KEY in text for text in steps.said)
  assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def answers_of(out, tree):
  """The records of a judge's cache, whose file is taken out of `tree`."""
  if tree.pop("out/judge_cache.sqlite", None) is None:
    return []
  return [json.dumps(record) for record in cached(out / "judge_cache.sqlite")]


def draw_with_kills(steps, out):
  count = lambda: len(list(out.glob("traces/**/*.json")))
  for number in range(KILLS):
    steps.kill("generate", out, count, number + random.randint(0, 1))
  steps.finish("generate", out)


def judge_with_kills(steps, server, out):
  """Kills the step while the endpoint is well, then lets it fail at one request of three."""
  for _ in range(KILLS):
    sent = len(server.bodies)
    steps.kill("score", out, lambda: len(server.bodies) - sent, random.randint(1, 2))
    assert not (out / "scores.json").exists()
  faults = [random.choice((*FAULTS, *[None] * 2 * len(FAULTS))) for _ in range(1000)]
  server.faults = lambda number, _: faults[number]


def check_every_item_once(files):
  """Each line has scores or a reason; the summaries count as many as there are lines."""
  items = [json.loads(line) for line in files["out/items.jsonl"].splitlines()]
  assert max(collections.Counter((e["id"], e["round"], e["picture"]) for e in items).values()) == 1
  assert all(bool(e["scores"]) or e["why"] for e in items) and any(e["scores"] for e in items)
  scores = json.loads(files["out/scores.json"])
  if scores["benchmark"] in ("wise", "tiif"):
    for number, summary in scores["rounds"].items():
      without = [e for e in items if e["round"] == int(number) and not e["scores"]]
      assert all(e["why"].startswith("unparsable") for e in without)
      assert summary["unscored"]["by_reason"] == {"unparsable": len(without)}
      assert summary["missing"] == 0 < len(without)
