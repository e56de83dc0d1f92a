"""Questions to a judge: which ones for which image, and their answers by prompt."""

import base64
import io
import json
import re

from judge_server import JudgeServer, prompt_of
import numpy as np
from PIL import Image
import pytest

from irg_jax import evaluate
from irg_jax.evaluate import oneig as oneig_lib
from irg_jax.evaluate import questions
from irg_jax.evaluate import tiif as tiif_lib
from irg_jax.evaluate import wise as wise_lib
from irg_jax.evaluate.base import Item
from irg_jax.evaluate.genai_bench import GENAI_BENCH
from irg_jax.evaluate.judge import Judge
from irg_jax.evaluate.oneig import ONEIG
from irg_jax.evaluate.questions import Answer, JudgeSettings
from irg_jax.evaluate.tiif import TIIF as TIIF_BENCH
from irg_jax.evaluate.wise import WISE as WISE_BENCH

WISE = Item("wise", "901", "A candle", 1, {"prompt_id": 901, "Explanation": "it does not burn"})
TIIF = Item("tiif", "color+2d/short/0", "A clock", 1,
            {"attribute": "color+2d", "length": "short", "line": 0})
GENAI = Item("genai_bench", "00007", "A baker", 1, {})
ALIGNED, TEXT, REASON = (Item("oneig", name, "x", 4, {"class": ""})
                         for name in ("anime/003", "text/004", "reasoning/005"))
Q_D = {"anime": {"003": ({1: "Is there a fox?", 2: "Is it red?"}, {1: [0], 2: [1]})},
       "human": {}, "object": {}}
TEXTS = {"004": "['OPEN']"}
ASKED = {"questions": Q_D, "texts": TEXTS}


def grid(path, black=()):
  """A 2 x 2 grid of 6 x 4 pixels a cell, each of one grey; one pixel is over at the right."""
  image = np.full((8, 13, 3), 255, np.uint8)
  for i in range(4):
    shade = 0 if i in black else 50 * (i + 1)
    image[i // 2 * 4 : i // 2 * 4 + 4, i % 2 * 6 : i % 2 * 6 + 6] = shade
  Image.fromarray(image).save(path)
  return path


def test_each_benchmarks_request_says_what_is_to_be_judged_and_in_which_form(tmp_path):
  (wise,) = WISE_BENCH.questions(WISE, tmp_path / "1.png", 2)
  assert wise.key == "wise/901/p0/r2/scores" and wise.images == (tmp_path / "1.png",)
  assert "A candle" in wise.prompt and "it does not burn" in wise.prompt
  for name in ("Consistency", "Realism", "Aesthetic Quality"):
    assert re.search(rf"^{name}: 0, 1 or 2$", wise.prompt, re.MULTILINE)
  asked = {("color+2d", 0): (["Is there a clock? ", "Is it blue?"], ["yes", "no"])}
  (tiif,) = TIIF_BENCH.questions(TIIF, tmp_path / "0.png", 1, asked)
  assert "\nIs there a clock?\nIs it blue?\n" in tiif.prompt and "2 lines" in tiif.prompt
  (genai,) = GENAI_BENCH.questions(GENAI, tmp_path / "7.jpeg", 1)
  assert genai.probability and "A baker" in genai.prompt


def test_a_question_knows_what_is_no_answer_and_what_is_none_to_the_published_script():
  (wise,) = WISE_BENCH.questions(WISE, "1.png", 1)
  assert wise.fault("Consistency: 2\nRealism: 1\nAesthetic Quality: 0") is None
  assert wise.fault("2\n1\n0") is None
  assert wise.fault("Consistency: 2") == "no score for realism and aesthetic_quality"
  assert wise.official("Consistency: 8/10\nRealism: 1\nAesthetic Quality: 1") is None
  (tiif,) = TIIF_BENCH.questions(TIIF, "0.png", 1, {("color+2d", 0): (["a?", "b?"], ["yes", "no"])})
  assert tiif.fault("Yes, a\nno") is tiif.fault("1. yes\n2. no") is None
  assert "for 2 questions" in tiif.official("1. yes\n2. no")
  assert "for 2 questions" in tiif.fault("yes") and tiif.official("Yes, a\nno") is None


def test_alignment_asks_each_question_of_each_cell_but_of_no_black_one(tmp_path):
  path = grid(tmp_path / "003.png", black=(2,))
  asked = list(ONEIG.questions(ALIGNED, path, 1, ASKED))
  assert [r.key for r in asked] == [f"oneig/anime/003/p{c}/r1/alignment{n}"
                                    for c in (0, 1, 3) for n in (1, 2)]
  for request, level in zip(asked[::2], (50, 100, 200)):
    (cell,) = request.images
    encoded = questions.encode(cell)
    assert encoded.url.startswith("data:image/jpeg;base64,")
    data = base64.b64decode(encoded.url.partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
      assert image.size == (6, 4) and abs(int(np.asarray(image).mean()) - level) < 3
  assert asked[0].prompt.startswith("Is there a fox?\n") and "No" in asked[0].prompt
  assert asked[0].fault("Yes") is asked[0].fault("no, it is blue") is None
  assert asked[0].fault("The fox may be there") is not None


def test_a_grid_that_is_missing_is_asked_about_so_that_it_is_reported(tmp_path):
  assert len(list(ONEIG.questions(ALIGNED, tmp_path / "none.webp", 1, ASKED))) == 8


def test_transcription_is_asked_of_text_prompts_only_within_the_official_limit(tmp_path):
  path = grid(tmp_path / "004.png")
  short = list(ONEIG.questions(TEXT, path, 1, ASKED))
  assert [r.key for r in short] == [f"oneig/text/004/p{c}/r1/text" for c in range(4)]
  long = list(ONEIG.questions(TEXT, path, 1, ASKED | {"texts": {"004": "word " * 61}}))
  assert {r.max_tokens for r in short} == {128} and {r.max_tokens for r in long} == {256}
  assert not list(ONEIG.questions(REASON, path, 1, ASKED))


def test_keys_of_any_item_read_back():
  for name, item, cell, round, question in (("tiif", "color+2d/short/0", 0, 2, "answers"),
                                            ("oneig", "anime/p1/r1/x", 3, 1, "y")):
    key = questions.key(name, item, cell, round, question)
    (group,) = questions.answers([item], (round,), lambda asked: (Answer(q.key) for q in asked),
                                 lambda *_: [questions.Question(key, (), "q")])
    assert group == (item, round, {(cell, question): Answer(key)})


def test_answers_come_by_prompt_and_round_also_for_prompts_without_questions(tmp_path):
  path = grid(tmp_path / "grid.png")
  items = [REASON, ALIGNED, REASON, TEXT, REASON]
  items = [Item("oneig", f"{i.id}{n}" if i is REASON else i.id, "x", 4, {"class": ""})
           for n, i in enumerate(items)]
  groups = list(questions.answers(
      items, (1, 2), lambda requests: (Answer(r.key, "Yes") for r in requests),
      lambda item, round: ONEIG.questions(item, path, round, ASKED)))
  assert [(i.id, r, len(found)) for i, r, found in groups] == [
      (i.id, r, n) for r in (1, 2) for i, n in zip(items, (0, 8, 0, 4, 0))]
  assert set(groups[3][2]) == {(c, "text") for c in range(4)}


def test_scores_from_a_judge_that_fails_at_times_count_every_prompt_once(tmp_path, monkeypatch):
  pytest.importorskip("openai", reason="the judge's client needs the extra `eval`")
  monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
  items = [Item("wise", str(i), f"prompt <{i}>", 1, {"prompt_id": i, "Explanation": "e"})
           for i in range(1, 31)]
  for item in items[:-1]:
    Image.new("RGB", (4, 4), (int(item.id), 0, 0)).save(tmp_path / f"{item.id}.png")
  def answer(body):
    number = int(re.search(r"<(\d+)>", prompt_of(body))[1])
    return "I cannot say" if number == 7 else (
        f"Consistency: {number % 3}\nRealism: 1\nAesthetic Quality: 2")
  fault = lambda n, body: "400" if "<5>" in prompt_of(body) else ("500" if n % 3 == 0 else None)
  def score():
    scorer = wise_lib.Scorer()
    with JudgeServer(answer, fault) as server:
      settings = JudgeSettings(server.url, "m", first_wait=0.001)
      with Judge(settings, tmp_path / "cache.sqlite") as judge:
        for item, _, found in questions.answers(items, (1,), judge.ask, lambda item, round: (
            WISE_BENCH.questions(item, tmp_path / f"{item.id}.png", round))):
          scorer.add(item, found)
        return scorer.value(), judge.account
  first, account = score()
  again, later = score()
  assert first == again and later.cached == 27 and later.answered == 0
  assert first["unscored"]["by_reason"] == {"picture": 1, "unparsable": 1, "status 400": 1}
  assert first["items"] == 27 and account.questions == 30


def test_a_template_file_replaces_the_wording_and_must_have_the_fields(tmp_path):
  path = tmp_path / "t.json"
  path.write_text(json.dumps({"user": "Q: {question} {other}", "system": "S"}))
  template = questions.load_template(path, "oneig_alignment", ("question",))
  assert template.fill(question="{other} {question}") == ("Q: {other} {question} {other}", "S")
  with pytest.raises(ValueError, match=r"no \{prompt\}"):
    questions.load_template(path, "wise", ("prompt", "explanation"))
  for text in ("not json", "[]", '{"system": "s"}', '{"user": 3}', '{"user": "u", "model": "m"}'):
    path.write_text(text)
    with pytest.raises(ValueError, match="--template.*t.json"):
      questions.load_template(path, "tiif", ("questions",))


def test_every_built_in_wording_asks_for_its_fields():
  for template, fields in (t for b in evaluate.BENCHMARKS.values() for t in b.templates.values()):
    assert all(f"{{{field}}}" in template.user for field in fields)
    filled = template.fill(**{f: "<>" for f in (*fields, "count")})
    assert not re.search(r"\{\w+\}", "".join(filled))


def tiif_file(folder, *lines):
  (folder / "color+2d_eval_prompts.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))


def test_tiif_questions_are_read_by_type_and_line(tmp_path):
  tiif_file(tmp_path, {"type": "color+2d", "yn_question_list": ["a?", "b?"],
                       "yn_answer_list": ["yes", "No"]})
  assert tiif_lib.read_questions(tmp_path, [TIIF]) == {
      ("color+2d", 0): (["a?", "b?"], ["yes", "No"])}


@pytest.mark.parametrize("line, words", [
    ({"yn_question_list": ["a?"], "yn_answer_list": []}, "1 questions and 0 answers"),
    ({"yn_question_list": ["a?"], "yn_answer_list": ["maybe"]}, "neither yes nor no"),
    ({"yn_question_list": [3], "yn_answer_list": ["yes"]}, "3 is not a text"),
    ({"yn_question_list": "a?", "yn_answer_list": ["yes"]}, "yn_question_list")])
def test_a_malformed_question_line_is_named_by_file_and_line(tmp_path, line, words):
  tiif_file(tmp_path, line)
  with pytest.raises(ValueError, match=rf"color\+2d_eval_prompts.jsonl, line 1.*{words}"):
    tiif_lib.read_questions(tmp_path, [TIIF])


def test_questions_that_do_not_belong_to_the_prompts_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no file color\+2d_eval_prompts"):
    tiif_lib.read_questions(tmp_path, [TIIF])
  tiif_file(tmp_path, {"yn_question_list": ["a?"], "yn_answer_list": ["yes"]})
  later = Item("tiif", "color+2d/long/4", "x", 1, TIIF.extra | {"line": 4})
  with pytest.raises(ValueError, match="has no line 5"):
    tiif_lib.read_questions(tmp_path, [TIIF, later])


def test_the_texts_to_draw_are_read_by_id_and_bad_rows_named(tmp_path):
  path = tmp_path / "text_content.csv"
  path.write_text(",id,prompt_en,text_content\n0,000,p,\"['A, B']\"\n1,7,p,['C']\n")
  assert oneig_lib.read_texts(path) == {"000": "['A, B']", "007": "['C']"}
  path.write_text("id,text_content\n000,a\n000,b\n")
  with pytest.raises(ValueError, match="line 3: id 000 is there already, at .*line 2"):
    oneig_lib.read_texts(path)
  path.write_text("number,text\n1,a\n")
  with pytest.raises(ValueError, match="no column 'id'; the columns must be id, text_content"):
    oneig_lib.read_texts(path)
