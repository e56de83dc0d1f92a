"""The judge's client against a server that answers, is slow, busy, broken, or refuses."""

import collections
import random
import threading
import time

from judge_server import FAULTS, JudgeServer, cached, prompt_of
import numpy as np
from PIL import Image
import pytest

from irg_jax.evaluate import judge as judge_lib
from irg_jax.evaluate import questions
from irg_jax.evaluate.judge import Judge
from irg_jax.evaluate.questions import JudgeSettings, Question

pytest.importorskip("openai", reason="the judge's client needs the extra `eval`")

KEY = "sk-test-4Vd0qLw93kTzPp"


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def image(tmp_path):
  path = tmp_path / "picture.png"
  Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
  return path


def settings(server, **changes):
  return JudgeSettings(**{"url": server.url, "model": "m", "timeout": 5.0, "first_wait": 0.01,
                     "concurrency": 4} | changes)


def requests(image, count, **fields):
  return [Question(f"k{i}", (image,), f"question {i}", **fields) for i in range(count)]


def echo(body):
  return "answer to " + prompt_of(body)


def test_every_request_gets_its_own_answer_in_order_and_with_all_that_was_asked(tmp_path, image):
  with JudgeServer(echo, seconds=0.002) as server:
    with Judge(settings(server, temperature=0.5), tmp_path / "cache.sqlite") as judge:
      asked = requests(image, 40, system="be strict", max_tokens=77)
      answers = list(judge.ask(iter(asked)))
    assert [a.key for a in answers] == [r.key for r in asked]
    assert [a.text for a in answers] == [f"answer to question {i}" for i in range(40)]
    assert all(a.error is None and a.model == "m-dated" for a in answers)
    body = server.bodies[0]
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 77)
  assert body["messages"][0] == {"role": "system", "content": "be strict"}
  url = body["messages"][1]["content"][0]["image_url"]["url"]
  assert url == questions.encode(image).url
  assert server.most <= 4 and set(server.keys) == {f"Bearer {KEY}"}


def test_no_more_requests_are_taken_or_under_way_than_the_settings_say(tmp_path, image):
  taken, both = [], threading.Barrier(2, timeout=30)
  def stream():
    for request in requests(image, 200):
      taken.append(request.key)
      yield request
  def answer(body):
    if len(server.bodies) <= 2:
      both.wait()  # the first two requests are under way at once, however slow the machine is
    return echo(body)
  with JudgeServer(answer) as server:
    with Judge(settings(server, concurrency=2), tmp_path / "cache.sqlite") as judge:
      for i, _ in enumerate(judge.ask(stream())):
        assert len(taken) - i <= 2 * 8 + 1
    assert server.most == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_one_try_after_each_kind_of_failure_gives_the_answer(tmp_path, image, fault):
  with JudgeServer(echo, lambda n, _: fault if n % 2 == 0 else None) as server:
    with Judge(settings(server, concurrency=1), tmp_path / "cache.sqlite") as judge:
      answers = list(judge.ask(requests(image, 3)))
      account = judge.account
  assert [a.text for a in answers] == [f"answer to question {i}" for i in range(3)]
  assert account.answered == 3 and not account.failed
  assert account.calls == len(server.bodies) == (3 if fault == "slow" else 6)
  assert account.faults.total() == account.calls - 3


def test_all_failures_at_random_lose_and_double_nothing(tmp_path, image):
  dice = random.Random(3)
  plan = [dice.choice((*FAULTS, None, None)) for _ in range(4000)]
  asked = requests(image, 60)
  with JudgeServer(echo, lambda n, _: plan[n]) as server:
    with Judge(settings(server, tries=12, first_wait=0.001), tmp_path / "cache.sqlite") as judge:
      answers = list(judge.ask(asked))
      account = judge.account
    assert [a.key for a in answers] == [r.key for r in asked]
    assert account.questions == 60 == account.answered + account.failed.total()
    for answer in answers:
      if answer.error is None:
        assert answer.text == "answer to question " + answer.key[1:]
    assert account.answered > 50
    assert all(n == 1 for n in server.told.values())  # none is paid for twice


def test_what_fails_every_time_is_reported_by_reason_and_only_that(tmp_path, image):
  always = {"question 1": "500", "question 3": "empty", "question 5": "malformed",
            "question 6": "drop", "question 7": "400", "question 8": "filtered"}
  with JudgeServer(echo, lambda _, body: always.get(prompt_of(body))) as server:
    with Judge(settings(server, tries=3), tmp_path / "cache.sqlite") as judge:
      answers = {a.key: a for a in judge.ask(requests(image, 10))}
      account = judge.account
    tries = collections.Counter(map(prompt_of, server.bodies))
  assert {k for k, a in answers.items() if a.error} == {"k1", "k3", "k5", "k6", "k7", "k8"}
  assert dict(account.failed) == {"server (5xx)": 1, "empty": 1, "malformed": 1, "connection": 1,
                                  "status 400": 1, "filtered": 1}
  assert tries["question 1"] == 3 and tries["question 7"] == tries["question 8"] == 1
  assert answers["k1"].text is None


def test_failures_are_asked_again_by_the_next_run_and_answers_are_not(tmp_path, image):
  broken = True
  with JudgeServer(echo, lambda _, b: "500" if broken and "1" in prompt_of(b) else None) as server:
    with Judge(settings(server, tries=1), tmp_path / "cache.sqlite") as judge:
      assert sum(a.error is not None for a in judge.ask(requests(image, 5))) == 1
    broken, before = False, len(server.bodies)
    with Judge(settings(server), tmp_path / "cache.sqlite") as judge:
      again = list(judge.ask(requests(image, 5)))
      assert (judge.account.cached, judge.account.answered) == (4, 1)
    assert len(server.bodies) == before + 1
  assert [a.text for a in again] == [f"answer to question {i}" for i in range(5)]


def test_a_second_run_costs_nothing_and_gives_the_same_answers(tmp_path, image):
  with JudgeServer(echo) as server:
    with Judge(settings(server), tmp_path / "cache.sqlite") as judge:
      first = [(a.key, a.text, a.model) for a in judge.ask(requests(image, 30))]
  unreachable = settings(server, url="http://127.0.0.1:9/v1")
  with Judge(unreachable, tmp_path / "cache.sqlite") as judge:
    assert [(a.key, a.text, a.model) for a in judge.ask(requests(image, 30))] == first
    assert judge.account.cached == 30 and judge.account.calls == 0


def test_the_cache_knows_images_by_content_and_tells_every_setting_apart(tmp_path, image):
  copy = tmp_path / "copy.png"
  copy.write_bytes(image.read_bytes())
  other = tmp_path / "other.png"
  Image.new("RGB", (8, 8)).save(other)
  base = Question("a", (image,), "q")
  changed = [Question("a", (other,), "q"), Question("a", (image,), "r"),
             Question("a", (image,), "q", system="s"), Question("a", (image,), "q", max_tokens=9),
             Question("a", (image, image), "q")]
  with JudgeServer(echo) as server:
    def calls(request, **changes):
      with Judge(settings(server, **changes), tmp_path / "cache.sqlite") as judge:
        assert next(judge.ask([request])).error is None
        return judge.account.calls
    assert calls(base) == 1
    assert calls(base) == calls(Question("b", (copy,), "q")) == calls(base, temperature=0) == 0
    assert [calls(request) for request in changed] == [1] * len(changed)
    assert calls(base, temperature=0.1) == calls(base, model="n") == 1


def test_the_same_question_at_the_same_time_is_asked_once(tmp_path, image):
  with JudgeServer(echo, seconds=0.03) as server:
    with Judge(settings(server), tmp_path / "cache.sqlite") as judge:
      answers = list(judge.ask(Question(f"k{i}", (image,), "same") for i in range(12)))
      assert (judge.account.answered, judge.account.cached) == (1, 11)
  assert len(server.bodies) == 1 and {a.text for a in answers} == {"answer to same"}


def test_two_requests_of_one_key_are_refused(tmp_path, image):
  with JudgeServer(echo) as server, Judge(settings(server), tmp_path / "cache.sqlite") as judge:
    with pytest.raises(ValueError, match="two questions.*'k0'"):
      list(judge.ask(requests(image, 2) + requests(image, 1)))


def test_an_answer_that_cannot_be_parsed_is_asked_for_again_and_then_reported_with_its_words(
    tmp_path, image):
  texts = iter(["hm", "hm", "2", "hm", "hm", "hm"])
  fault = lambda text: None if text.isdigit() else "no digit"
  ask = lambda judge: list(judge.ask(requests(image, 2, fault=fault)))
  with JudgeServer(lambda _: next(texts)) as server:
    one = settings(server, concurrency=1)
    with Judge(one, tmp_path / "cache.sqlite") as judge:
      good, bad = ask(judge)
    assert (good.text, good.error) == ("2", None)
    assert (bad.text, bad.error) == ("hm", "unparsable: no digit")
    with Judge(one, tmp_path / "cache.sqlite") as judge:  # it has had its three answers
      assert [(a.text, a.error) for a in ask(judge)] == [("2", None), ("hm", bad.error)]
      assert judge.account.calls == 0 and judge.account.failed == {"unparsable": 1}
  assert len(server.bodies) == 6


def test_a_missing_or_torn_image_is_reported_and_never_sent(tmp_path, image):
  torn = tmp_path / "torn.png"
  torn.write_bytes(image.read_bytes()[:-30])
  asked = [Question("gone", (tmp_path / "gone.png",), "q"), Question("torn", (torn,), "q"),
           Question("good", (image,), "q")]
  with JudgeServer(echo) as server, Judge(settings(server), tmp_path / "cache.sqlite") as judge:
    gone, bad, good = judge.ask(asked)
    assert gone.error.startswith("picture: ") and "gone.png is missing" in gone.error
    assert "torn.png cannot be read" in bad.error
    assert good.error is None and len(server.bodies) == 1


@pytest.mark.parametrize("fault, words", [
    ("401", "refuses the key.*OPENAI_API_KEY"), ("403", "refuses the key"),
    ("404", "--judge-model"), ("quota", "quota is used up"), ("429 later", "wait 86400 s")])
def test_what_asking_on_cannot_help_stops_the_run_at_once(tmp_path, image, fault, words):
  with JudgeServer(echo, lambda n, _: fault if n >= 6 else None) as server:
    with Judge(settings(server, concurrency=2), tmp_path / "cache.sqlite") as judge:
      with pytest.raises(ValueError, match=words) as stop:
        list(judge.ask(requests(image, 200)))
    assert len(server.bodies) <= 6 + 2 * 2
    assert KEY not in str(stop.value)
    assert len(cached(tmp_path / "cache.sqlite")) == 6  # kept for next time


def test_an_endpoint_that_only_fails_ends_the_run_with_the_reason(tmp_path, image):
  with JudgeServer(echo) as server:
    pass  # nobody listens any more
  with Judge(settings(server, tries=2), tmp_path / "cache.sqlite") as judge:
    with pytest.raises(judge_lib.Stop, match="20 questions in a row failed.*connection"):
      list(judge.ask(requests(image, 100)))


def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_says(tmp_path, image, monkeypatch):
  waits = []
  monkeypatch.setattr(judge_lib, "retry_after", lambda headers: waits.append(1) or 0.3)
  with JudgeServer(echo, lambda n, _: "429" if n == 0 else None) as server:
    with Judge(settings(server, concurrency=1), tmp_path / "cache.sqlite") as judge:
      begin = time.monotonic()
      assert [a.error for a in judge.ask(requests(image, 2))] == [None, None]
      assert time.monotonic() - begin >= 0.3 and waits == [1]


def test_a_stop_ends_the_waits_of_the_other_questions(tmp_path, image, monkeypatch):
  monkeypatch.setattr(judge_lib, "retry_after", lambda headers: 60.0)
  fault = lambda _, body: {"question 0": "429", "question 1": "401"}[prompt_of(body)]
  with JudgeServer(echo, fault) as server:
    begin = time.monotonic()
    with Judge(settings(server, concurrency=2), tmp_path / "cache.sqlite") as judge:
      with pytest.raises(judge_lib.Stop, match="refuses the key"):
        list(judge.ask(requests(image, 2)))
    assert time.monotonic() - begin < 5


def test_an_interrupted_reader_keeps_the_answers_under_way(tmp_path, image):
  with JudgeServer(echo, seconds=0.3) as server:
    with pytest.raises(KeyboardInterrupt):
      with Judge(settings(server, concurrency=2), tmp_path / "cache.sqlite") as judge:
        for _ in judge.ask(requests(image, 20)):
          raise KeyboardInterrupt
    assert len(server.bodies) <= 4
  assert len(cached(tmp_path / "cache.sqlite")) == len(server.bodies)


def test_retry_after_is_read_as_seconds_or_as_a_date():
  read = lambda value: judge_lib.retry_after({"retry-after": value})
  assert read("2.5") == 2.5 and read("-3") == 0.0
  assert read("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
  assert read("Wed, 21 Oct 2093 07:28:00 GMT") > 1e9
  assert read("soon") is None and read("nan") is None and judge_lib.retry_after({}) is None


def test_an_answer_that_drips_is_cut_off_at_the_time_limit(tmp_path, image):
  with JudgeServer(echo, lambda n, _: "dribble" if n == 0 else None) as server:
    with Judge(settings(server, timeout=0.3), tmp_path / "cache.sqlite") as judge:
      (answer,) = judge.ask(requests(image, 1))
      assert answer.text == "answer to question 0" and judge.account.faults == {"timeout": 1}


def test_an_answer_of_megabytes_is_not_read_to_its_end_and_not_asked_for_again(tmp_path, image):
  with JudgeServer(echo, lambda n, _: "endless") as server:
    with Judge(settings(server), tmp_path / "cache.sqlite") as judge:
      (answer,) = judge.ask(requests(image, 1))
      assert answer.error == "malformed: an answer of more than 4194304 bytes"
    assert len(server.bodies) == 1


def test_an_answer_that_does_not_come_is_tried_again(tmp_path, image):
  calls = []
  def answer(body):
    calls.append(1)
    if len(calls) == 1:
      time.sleep(0.6)
    return "fine"
  with JudgeServer(answer) as server:
    with Judge(settings(server, timeout=0.3), tmp_path / "cache.sqlite") as judge:
      (answer,) = judge.ask(requests(image, 1))
      assert answer.text == "fine" and judge.account.faults == {"timeout": 1}


def test_the_key_is_in_no_file_or_message_even_if_the_endpoint_quotes_it(tmp_path, image):
  """The worst endpoint: it puts the key into its answers and its errors."""
  quoting = lambda body: f"your key is Bearer {KEY}, {prompt_of(body)}"
  faults = {"question 2": "400", "question 4": "500"}
  with JudgeServer(quoting, lambda _, body: faults.get(prompt_of(body))) as server:
    with Judge(settings(server, tries=2), tmp_path / "cache.sqlite") as judge:
      answers = list(judge.ask(requests(image, 6)))
    assert set(server.keys) == {f"Bearer {KEY}"}
  assert KEY not in repr(answers) + str(judge.account)
  assert "[OPENAI_API_KEY]" in answers[0].text and "[OPENAI_API_KEY]" in answers[2].error
  assert all(KEY.encode() not in p.read_bytes() for p in tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://me:secret-word@host/v1", "http://host/v1?key=secret-word",
                                 "localhost:8000", "http://host:99999/v1", ""])
def test_an_address_that_cannot_be_or_holds_a_secret_is_refused_without_repeating_it(url):
  with pytest.raises(ValueError, match="judge's address") as refusal:
    JudgeSettings(url=url, model="m")
  assert "secret-word" not in str(refusal.value)


@pytest.mark.parametrize("key", ["sk-with-a-newline\n", "sk with blanks", "ключ-от-судьи"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(
    tmp_path, monkeypatch, key):
  monkeypatch.setenv("OPENAI_API_KEY", key)
  with pytest.raises(ValueError, match="OPENAI_API_KEY has a blank") as refusal:
    Judge(JudgeSettings(url="http://127.0.0.1:9/v1", model="m"), tmp_path / "cache.sqlite")
  assert key.strip() not in str(refusal.value)


@pytest.mark.parametrize("field, value", [
    ("model", ""), ("temperature", 2.5), ("concurrency", 0), ("tries", 0), ("asks", 0),
    ("timeout", 0.0)])
def test_a_setting_that_cannot_be_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=field):
    JudgeSettings(**{"url": "http://host/v1", "model": "m", field: value})


def test_the_probability_of_yes_comes_from_the_first_tokens_alternatives(tmp_path, image):
  def choice(*pairs):
    top = [{"token": t, "logprob": float(np.log(p))} for t, p in pairs]
    return {"message": {"content": top[0]["token"]}, "logprobs": {"content": [
        {"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}]}}
  said = {"question 0": choice(("Yes", 0.6), (" yes", 0.1), ("No", 0.3)),
          "question 1": choice(("No", 0.997), ("Nope", 0.003)),
          "question 2": choice((" ", 0.5), ("yes", 0.4)),  # a blank is what was drawn
          "question 3": choice(("No", 0.5), ("Maybe", 0.4)), "question 4": "Yes"}
  with JudgeServer(lambda body: said[prompt_of(body)]) as server:
    with Judge(settings(server, asks=1), tmp_path / "cache.sqlite") as judge:
      first = list(judge.ask(requests(image, 5, probability=True)))
    with Judge(settings(server, asks=1), tmp_path / "cache.sqlite") as judge:
      again = list(judge.ask(requests(image, 5, probability=True)))
    body = server.bodies[0]
  assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
  for answers in (first, again):
    assert answers[0].probability == pytest.approx(0.7) and answers[1].probability == 0.0
    assert answers[2].probability == pytest.approx(0.4)
    for answer in answers[3:]:
      assert answer.probability is None and answer.error.startswith("unparsable: ")


def test_half_a_character_in_an_answer_is_replaced_so_that_it_can_be_written(tmp_path, image):
  with JudgeServer(lambda _: "a \ud800 b") as server:
    with Judge(settings(server), tmp_path / "cache.sqlite") as judge:
      (answer,) = judge.ask(requests(image, 1))
  assert answer.text == "a ? b"


def test_a_reader_that_leaves_early_leaves_no_request_waiting(tmp_path, image):
  with JudgeServer(echo, seconds=0.01) as server:
    with Judge(settings(server, concurrency=2), tmp_path / "cache.sqlite") as judge:
      answers = judge.ask(requests(image, 100))
      next(answers)
      answers.close()
      time.sleep(0.1)
      assert len(server.bodies) < 12
    with Judge(settings(server), tmp_path / "cache.sqlite") as judge:
      assert len(list(judge.ask(requests(image, 100)))) == 100
  assert all(n == 1 for n in server.told.values())
