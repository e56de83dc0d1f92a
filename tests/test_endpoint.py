"""Replies of a judge's endpoint: their bounds, redirects, forms of the content, flags."""

import resource
import time

from judge_server import JudgeServer, cached, prompt_of
from PIL import Image
import pytest

from irg_jax.evaluate.judge import Judge, Stop
from irg_jax.evaluate.questions import JudgeSettings, Question
from irg_jax.evaluate.records import Cache

pytest.importorskip("openai", reason="the judge's client needs the extra `eval`")

MOST = 40 << 20  # bytes that a reply may cost; a flood has 500 MiB, a bomb 128


def ask(server, folder, count=1, question=None, **changes):
  """The answers to some questions, and the account."""
  image = folder / "picture.png"
  Image.new("RGB", (8, 8), (9, 0, 0)).save(image)
  settings = JudgeSettings(**{"url": server.url, "model": "m", "timeout": 5.0, "first_wait": 0.01,
                              "tries": 2, "concurrency": 1} | changes)
  with Judge(settings, folder / "cache.sqlite") as judge:
    return list(judge.ask(Question(**{"key": f"k{i}", "images": (image,), "prompt": f"q{i}"}
                                   | (question or {})) for i in range(count))), judge.account


@pytest.mark.parametrize("fault, error", [
    ("500 flood", "server (5xx)"), ("200 flood", "malformed: an answer of more than 4194304 bytes"),
    ("bomb", "malformed: an answer of more than 4194304 bytes")])
def test_a_flood_is_read_to_its_bound_only(tmp_path, fault, error):
  with JudgeServer(faults=lambda *_: fault) as server:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (answer,), _ = ask(server, tmp_path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
  assert answer.error.startswith(error) and len(answer.error) < 400
  assert server.sent < MOST
  assert grown < MOST


@pytest.mark.parametrize("fault", ["dribble", "error dribble", "header dribble"])
def test_one_deadline_holds_for_headers_and_bodies_of_answers_and_errors(tmp_path, fault):
  with JudgeServer(faults=lambda *_: fault) as server:
    begin = time.monotonic()
    (answer,), account = ask(server, tmp_path, timeout=0.3)
  assert time.monotonic() - begin < 3 and account.faults == {"timeout": 2}
  assert answer.error == "timeout: no answer within 0.3 s"


@pytest.mark.parametrize("fault", ["302", "307"])
def test_a_redirect_is_named_and_nothing_goes_to_where_it_leads(tmp_path, fault):
  with JudgeServer() as other, JudgeServer(faults=lambda *_: fault) as server:
    server.elsewhere = other.url.removesuffix("/v1")
    with pytest.raises(Stop, match=rf"redirects \({fault}\) to .*/chat/completions, .*--judge-url"):
      ask(server, tmp_path)
    assert not other.bodies and len(server.bodies) == 1


def test_a_compressed_answer_is_read_within_the_same_bound(tmp_path):
  with JudgeServer(faults=lambda *_: "gzip") as server:
    assert ask(server, tmp_path)[0][0].text == "zipped"


@pytest.mark.parametrize("content, text", [
    ([{"type": "text", "text": "Yes"}], "Yes"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "No"}]},
      {"type": "text", "text": "Yes"}], "Yes"),
    (["Yes, ", "it is"], "Yes, it is"), ([{"type": "output_text", "text": "No"}], "No")])
def test_the_content_may_be_a_list_of_parts(tmp_path, content, text):
  with JudgeServer(lambda _: {"message": {"content": content}}) as server:
    assert ask(server, tmp_path)[0][0].text == text


@pytest.mark.parametrize("content", [[{"type": "text"}], 7, [3], {"text": "x"}, [["x"]]])
def test_a_content_of_another_form_is_malformed(tmp_path, content):
  with JudgeServer(lambda _: {"message": {"content": content}}) as server:
    (answer,), account = ask(server, tmp_path)
  assert answer.error.startswith("malformed: ") and account.calls == 2


def test_flags_say_which_limit_and_temperature_are_sent(tmp_path):
  with JudgeServer() as server:
    ask(server, tmp_path)
    ask(server, tmp_path, temperature=None, completion_tokens=True, answer_limit=5000)
    ask(server, tmp_path, question={"probability": True}, asks=1, answer_limit=5000)
  plain, changed, probability = [{k: v for k, v in b.items() if k not in ("model", "messages")}
                                 for b in server.bodies]
  assert plain == {"max_tokens": 2000, "temperature": 0.0}
  assert changed == {"max_completion_tokens": 5000}
  assert probability["max_tokens"] == 1


@pytest.mark.parametrize("said, flag", [
    ("Unsupported parameter: use 'max_completion_tokens' instead", "--max-completion-tokens"),
    ("'temperature' does not support 0.0 with this model", "--no-temperature")])
def test_a_refused_parameter_stops_at_once_and_names_the_flag(tmp_path, said, flag):
  with JudgeServer(faults=lambda *_: f"400 {said}") as server:
    with pytest.raises(Stop, match=f"add {flag}. It said: .*{said[:20]}"):
      ask(server, tmp_path, count=30)
    assert len(server.bodies) < 3


def choice(text, finish):
  return {"message": {"content": text}, "finish_reason": finish}


def test_an_answer_that_was_cut_off_is_none_unless_strict(tmp_path):
  with JudgeServer(lambda _: choice("Yes", "length")) as server:
    (answer,), _ = ask(server, tmp_path, asks=1)
    assert answer.error == "cut off: at 2000 tokens (--answer-limit)"
    assert ask(server, tmp_path, strict=True, asks=1)[0][0].error is None
    assert len(server.bodies) == 1  # what is paid for is read again, both ways
  with JudgeServer(lambda _: choice(None, "length")) as server:  # all tokens went into a thought
    (answer,), account = ask(server, tmp_path, asks=2, model="n")
    assert answer.error.startswith("cut off") and account.calls == 1


@pytest.mark.parametrize("finish, error", [
    ("MAX_TOKENS", "cut off"), ("model_length", "cut off"), ("SAFETY", "filtered"),
    ("insufficient_system_resource", "broken off"), ("abort", "broken off")])
def test_other_words_for_an_answer_that_did_not_end_are_known(tmp_path, finish, error):
  with JudgeServer(lambda _: choice("Yes", finish)) as server:
    assert ask(server, tmp_path)[0][0].error.startswith(error)


def test_a_withheld_answer_is_filtered_and_a_refusal_is_the_answer(tmp_path):
  with JudgeServer(lambda _: choice("Yes", "content_filter")) as server:
    assert ask(server, tmp_path)[0][0].error.startswith("filtered: ")
  refusal = {"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}
  with JudgeServer(lambda _: refusal) as server:
    assert ask(server, tmp_path)[0][0].text == "I cannot"


def test_a_run_of_irregular_answers_stops_and_says_what_the_judge_said(tmp_path):
  fault = {"fault": lambda text: "neither yes nor no"}
  with JudgeServer(lambda body: f"Hm \u202e\x1b[31m {prompt_of(body)}") as server:
    with pytest.raises(Stop) as stop:
      ask(server, tmp_path, count=400, question=fault, concurrency=4)
    assert len(server.bodies) <= 3 * (10 + 2 * 4)
  said = str(stop.value)
  assert "10 answers in a row cannot be read" in said and "neither yes nor no" in said
  assert "Hm [U+202E][U+001B][31m q9" in said and "\x1b" not in said and "\u202e" not in said


def test_irregular_answers_now_and_then_stop_nothing(tmp_path):
  fault = {"fault": lambda text: None if text.endswith("7") else "no 7"}
  with JudgeServer(prompt_of) as server:
    answers, account = ask(server, tmp_path, count=60, question=fault, asks=1)
  assert sum(a.error is None for a in answers) == 6 and account.failed == {"unparsable": 54}


def test_a_probability_of_an_older_cache_is_asked_for_again(tmp_path):
  top = [{"token": t, "logprob": p} for t, p in (("Yes", -0.1), ("No", -2.5))]
  said = {"message": {"content": "Yes"}, "finish_reason": "length",
          "logprobs": {"content": [{"top_logprobs": top}]}}
  with JudgeServer(lambda _: said) as server:
    question = {"probability": True}
    assert ask(server, tmp_path, question=question)[0][0].probability == pytest.approx(0.905, 1e-3)
    record = cached(tmp_path / "cache.sqlite")[0]
    del record["no_score"]
    with Cache(tmp_path / "cache.sqlite") as cache:
      cache.add(record | {"probability": 0.0})
    assert ask(server, tmp_path, question=question)[0][0].probability == pytest.approx(0.905, 1e-3)
    assert len(server.bodies) == 2
