"""The API of `irg serve`: OpenAI's client draws, edits, asks and streams; bounds and errors.

The server is real, and so are the connections; what it draws is made by `serving.Drawer`.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import re
import subprocess
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from conftest import ROOT
from engine import SYSTEM_PROMPT, make_checkpoint
from irg_jax import commands
from irg_jax.config import update
from irg_jax.generate.settings import expand
from irg_jax.images import encode_image
from irg_jax.serve.engine import Closing, Engine
from irg_jax.serve.work import Work
from serving import Drawer, image_of, serving, text_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def drawer():
  return Drawer()


@pytest.fixture(scope="module")
def served(checkpoint, drawer):
  with pytest.MonkeyPatch.context() as patch, serving(checkpoint, patch, drawer) as found:
    yield found


@pytest.fixture
def settings(served):
  return served[0].engine.settings


@pytest.fixture(scope="module")
def client(served):
  with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0) as made:
    yield made


def pixels(text):
  return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def photo(width=48, height=32, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def data_url(image):
  return f"data:image/png;base64,{base64.b64encode(encode_image(image)).decode()}"


def eventually(check, seconds=5.0):
  end = time.monotonic() + seconds
  while not (found := check()) and time.monotonic() < end:
    time.sleep(0.01)
  return found


def test_the_client_draws_every_round_and_gets_the_last_image_with_its_thought(client, settings):
  reply = client.images.generate(prompt="a fox", n=2, extra_body={"seed": 7})
  for i, found in enumerate(reply.data):
    rounds = found.irg["rounds"]
    assert found.irg["seed"] == 7 + i and len(rounds) == 2
    for number, entry in enumerate(rounds):
      assert entry["thought"] == text_of("a fox", 7 + i, number)
      np.testing.assert_array_equal(
          pixels(entry["b64_json"]), image_of("a fox", 7 + i, number, settings))
      assert entry["seconds"] == {"think": 0.1, "draw": 0.2} and not entry["hit_limit"]
    assert found.b64_json == rounds[-1]["b64_json"]
    assert found.revised_prompt == rounds[-1]["thought"]
  tokens = reply.usage.model_dump()["output_tokens_details"]  # older clients know no such field
  assert reply.size == "48x32" and tokens["image_tokens"] == 2 * 2 * 6


@pytest.mark.parametrize("fields, changes", [
    ({"num_inference_steps": 7}, {"steps": 8}),
    ({"guidance_scale": 2.5}, {"text_scale": 2.5}),
    ({"guidance_scale": 3}, {"text_scale": 3.0}),
    ({"true_cfg_scale": 1.5}, {"image_scale": 1.5}),
    ({"flow_shift": 2.0}, {"timestep_shift": 2.0}),
    ({"max_think_tokens": 3}, {"think_limit": 4}),
    ({"think_temperature": 0.9}, {"temperature": 0.9}),
    ({"rounds": 3}, {"rounds": 3}),
    ({"think": False}, {"think": False, "rounds": 1}),
    ({"size": "32x32"}, {"size": (32, 32)}),
    ({"size": "auto", "quality": "auto", "user": "me", "output_format": "png"}, {}),
])
def test_every_field_reaches_the_engine(client, drawer, settings, fields, changes):
  drawer.batches.clear()
  found = client.images.generate(prompt="a fox", extra_body={"seed": 1} | fields).data[0]
  wanted = update(settings, expand(changes))
  numbers = range(wanted.rounds)
  assert [batch[1:] for batch in drawer.batches] == [
      (n, dataclasses.replace(wanted, rounds=n + 1), SYSTEM_PROMPT) for n in numbers]
  for number, entry in zip(numbers, found.irg["rounds"], strict=True):
    np.testing.assert_array_equal(
        pixels(entry["b64_json"]), image_of("a fox", 1, number, wanted))
    assert (entry["thought"] is None) == (not wanted.think)


def test_a_request_without_a_seed_says_which_one_it_got(client, settings):
  seeds = {client.images.generate(prompt="a fox").data[0].irg["seed"] for _ in range(3)}
  assert len(seeds) == 3


def test_what_is_streamed_is_what_is_returned(client):
  whole = client.images.generate(prompt="a fox", n=2, extra_body={"seed": 4})
  thoughts, partial, last = {}, {}, {}
  for event in client.images.generate(
      prompt="a fox", n=2, stream=True, partial_images=3, extra_body={"seed": 4}):
    if event.type == "irg.thought.delta":
      key = event.index, event.round
      thoughts[key] = thoughts.get(key, "") + event.delta
    elif event.type == "image_generation.partial_image":
      assert event.partial_image_index == event.irg["round"]
      partial[event.irg["index"], event.irg["round"]] = event.b64_json
    else:
      assert event.type == "image_generation.completed"
      last[event.irg["index"]] = event
  for i, found in enumerate(whole.data):
    for number, entry in enumerate(found.irg["rounds"]):
      assert thoughts[i, number] == entry["thought"]
    assert partial[i, 0] == found.irg["rounds"][0]["b64_json"]
    assert last[i].b64_json == found.b64_json
    assert last[i].irg == found.irg | {"index": i}
    assert last[i].revised_prompt == found.revised_prompt
  assert len(thoughts) == 4 and len(partial) == len(last) == 2


def test_no_more_partial_images_are_streamed_than_asked_for(client):
  events = list(client.images.generate(prompt="a fox", stream=True, partial_images=0))
  assert {e.type for e in events} == {"irg.thought.delta", "image_generation.completed"}


def test_an_image_is_edited(client, settings):
  sources = [photo(), photo(seed=1)]
  files = [(f"{i}.png", encode_image(x)) for i, x in enumerate(sources)]
  found = client.images.edit(image=files, prompt="more rain", extra_body={
      "seed": 3, "guidance_scale": 2.0}).data[0]
  wanted = update(settings, expand({"text_scale": 2.0}))
  assert found.revised_prompt == text_of("more rain", 3, 1, sources)
  np.testing.assert_array_equal(
      pixels(found.b64_json), image_of("more rain", 3, 1, wanted, sources))
  events = list(client.images.edit(image=files[0], prompt="more rain", stream=True))
  assert events[-1].type == "image_edit.completed"


def test_images_of_other_sizes_are_fitted_to_the_size_that_distorts_them_least(client, drawer):
  for size, fitted in (((96, 64), "<48x32>"), ((100, 99), "<32x32>"), ((47, 33), "<48x32>")):
    message = {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": data_url(photo(*size))}}]}
    answer = client.chat.completions.create(model="tiny", messages=[message])
    assert answer.choices[0].message.content.endswith(fitted)


def test_a_url_of_an_image_gives_the_image_and_nothing_is_written(client, served):
  found = client.images.generate(prompt="a fox", response_format="url", extra_body={"seed": 2})
  url = found.data[0].url
  assert url == found.data[0].irg["rounds"][-1]["url"] and url.startswith(f"{served[1]}/images/")
  again = client.images.generate(prompt="a fox", extra_body={"seed": 2})
  assert httpx.get(url).content == base64.b64decode(again.data[0].b64_json)
  missing = httpx.get(f"{served[1]}/images/..%2f..%2fetc%2fpasswd")
  assert missing.status_code == 404 and "error" in missing.json()


def test_a_chat_reads_all_turns_in_their_order(client):
  messages = [
      {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
      {"role": "assistant", "content": "hi"},
      {"role": "user", "content": [
          {"type": "text", "text": "what is it"},
          {"type": "image_url", "image_url": {"url": data_url(photo())}}]}]
  ask = lambda **more: client.chat.completions.create(
      model="tiny", messages=messages, seed=5, max_tokens=4, **more)
  reply = ask()
  assert reply.choices[0].message.content == "Be brief. 5 5: hello / hi / what is it / <48x32>"
  assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3
  chunks = list(ask(stream=True, stream_options={"include_usage": True}))
  text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
  assert text == reply.choices[0].message.content
  assert chunks[-2].choices[0].finish_reason == "length"
  assert chunks[-1].usage.completion_tokens == 3


def test_a_chat_draws(client, settings):
  ask = lambda **more: client.chat.completions.create(
      model="tiny", messages=[{"role": "user", "content": "a fox"}], seed=5,
      extra_body={"modalities": ["image"], "rounds": 3}, **more)
  message = ask().choices[0].message
  assert message.content == text_of("a fox", 5, 2)
  url = message.images[0]["image_url"]["url"]
  wanted = image_of("a fox", 5, 2, settings)
  np.testing.assert_array_equal(pixels(url.partition(",")[2]), wanted)
  assert [r["thought"] for r in message.irg["rounds"]] == [
      text_of("a fox", 5, n) for n in range(3)]
  content, images, thoughts = "", [], {}
  for chunk in ask(stream=True):
    delta = chunk.choices[0].delta
    content += delta.content or ""
    images += getattr(delta, "images", None) or []
    if told := getattr(delta, "irg", None):
      thoughts[told["round"]] = thoughts.get(told["round"], "") + told.get("thought", "")
  assert content == message.content and images == message.images
  assert thoughts == {n: text_of("a fox", 5, n) for n in range(2)}


def test_the_model_and_what_it_accepts_are_listed(client, served):
  model, = client.models.list().data
  assert model.id == "tiny" and model.irg["sizes"] == ["48x32", "32x32"]
  assert client.models.retrieve("tiny").irg["num_inference_steps"] == 19
  with pytest.raises(openai.NotFoundError, match="not served here, only 'tiny'"):
    client.images.generate(prompt="a fox", model="dall-e-3")
  assert httpx.get(f"{served[1]}/health").json()["status"] == "ok"
  figures = httpx.get(f"{served[1]}/metrics").text
  assert 'irg_requests_total{path="/v1/models",status="200"} 1.0' in figures
  for name in ("irg_rows", "irg_batch_size_count", 'irg_phase_seconds_sum{phase="draw"}',
               "irg_compilations_total"):
    assert name in figures


def test_requests_that_agree_run_side_by_side_and_each_gets_its_own(client, drawer, settings):
  drawer.batches.clear()
  drawer.gate.clear()
  with concurrent.futures.ThreadPoolExecutor(9) as pool:
    draw = lambda i: client.images.generate(prompt=f"fox {i}", extra_body={
        "seed": i, "rounds": 1 + i % 3, **({"guidance_scale": 2.0} if i == 8 else {})})
    found = [pool.submit(draw, i) for i in range(9)]
    eventually(lambda: len(drawer.batches) == 1)
    drawer.gate.set()
    for i, reply in enumerate(found):
      image = reply.result().data[0]
      assert len(image.irg["rounds"]) == 1 + i % 3
      used = settings if i < 8 else update(settings, expand({"text_scale": 2.0}))
      np.testing.assert_array_equal(
          pixels(image.b64_json), image_of(f"fox {i}", i, i % 3, used))
  # 3 + 6 rows: batches of up to four, those with guidance apart.
  assert len(drawer.batches) < 3 * 3 + 9
  assert max(len(set(prompts)) for prompts, *_ in drawer.batches) == 4


@pytest.fixture
def start(served, monkeypatch):
  """Function (cases, **limits) -> an engine with one row that waits, and what it is told."""
  here = served[0].engine

  def make(cases, **limits):
    monkeypatch.setattr(Engine, "_cases", lambda self: cases)
    limits = dataclasses.replace(here.limits, **limits)
    engine, told = Engine(
        here.generator, here.settings, here.system_prompt, limits, here.metrics), []
    work = Work(settings=dataclasses.replace(here.settings, rounds=1), system_prompt="", seed=0,
                prompt="a fox")
    engine.submit([work], lambda row, event: told.append(event.kind))
    engine.start()
    return engine, told

  return make


def test_requests_that_wait_are_told_when_nothing_can_be_compiled(start):
  engine, told = start([(1, lambda: 1 / 0)], workers=2)
  assert eventually(lambda: told == ["failed"])
  engine.close()
  assert isinstance(engine.failure, ZeroDivisionError) and not engine.ready.is_set()
  with pytest.raises(Closing):
    engine.submit([], None)


def test_an_engine_that_is_closed_before_it_has_compiled_serves_what_waits(start, drawer):
  gate = threading.Event()
  engine, told = start([(1, gate.wait), (1, lambda: None), (4, lambda: None)], workers=2)
  closing = threading.Thread(target=engine.close)
  closing.start()
  time.sleep(0.05)
  gate.set()
  closing.join()
  assert told[-1] == "done" and "failed" not in told


def test_threads_share_what_waits_and_no_row_is_lost_or_drawn_twice(checkpoint, monkeypatch):
  drawer = Drawer(seconds=0.2)
  with serving(checkpoint, monkeypatch, drawer, workers=2) as (api, url):
    settings = api.engine.settings
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
      found = list(pool.map(lambda i: httpx.post(
          f"{url}/v1/images/generations", timeout=30,
          json={"prompt": f"fox {i}", "seed": i, "rounds": 1 + i % 3}), range(12)))
    for i, reply in enumerate(found):
      image = reply.json()["data"][0]
      assert len(image["irg"]["rounds"]) == 1 + i % 3
      np.testing.assert_array_equal(
          pixels(image["b64_json"]), image_of(f"fox {i}", i, i % 3, settings))
    assert eventually(lambda: api.engine.load == (0, 0))
  rows = [(prompt, number) for prompts, number, *_ in drawer.batches for prompt in set(prompts)]
  assert len(rows) == len(set(rows)) == 12 + 8 + 4


def test_the_largest_batch_goes_first_but_the_oldest_row_waits_two_turns_at_most(
    checkpoint, monkeypatch):
  drawer = Drawer()
  with serving(checkpoint, monkeypatch, drawer) as (api, url):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      def post(prompt, **more):
        before = sum(api.engine.load)
        sent = pool.submit(httpx.post, f"{url}/v1/images/generations", timeout=30,
                           json={"prompt": prompt, "rounds": 1} | more)
        assert eventually(lambda: sum(api.engine.load) > before)
        return sent

      drawer.gate.clear()
      sent = [post("first")]
      assert eventually(lambda: api.engine.load == (0, 1))
      sent += [post("old", num_inference_steps=3), *(post("new") for _ in range(14))]
      drawer.gate.set()
      assert all(reply.result().status_code == 200 for reply in sent)
  assert [prompts[0] for prompts, *_ in drawer.batches] == [
      "first", "new", "new", "old", "new", "new"]


def test_a_client_that_hangs_up_frees_its_place(served, client, drawer):
  for stream in (False, True):
    drawer.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
      httpx.post(f"{served[1]}/v1/images/generations", timeout=0.5,
                 json={"prompt": "a fox", "stream": stream, "rounds": 3})
    assert eventually(lambda: served[0].engine.load == (0, 0)), served[0].engine.load
    drawer.gate.set()
  assert client.images.generate(prompt="a fox", extra_body={"seed": 1}).data[0].b64_json


def test_a_full_queue_says_when_to_come_again(checkpoint, monkeypatch):
  drawer = Drawer()
  drawer.gate.clear()
  with serving(checkpoint, monkeypatch, drawer, queue=3, n=4) as (api, url):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      post = lambda n: httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "n": n},
                                  timeout=30)
      first = pool.submit(post, 3)
      assert eventually(lambda: sum(api.engine.load) == 3)
      refused = post(1)
      assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
      assert refused.json()["error"]["code"] == "queue_full"
      drawer.gate.set()
      assert first.result().status_code == 200 and post(1).status_code == 200
      assert post(4).status_code == 429  # never more at once than the queue holds


def test_a_request_that_takes_too_long_is_given_up(checkpoint, monkeypatch):
  drawer = Drawer()
  drawer.gate.clear()
  with serving(checkpoint, monkeypatch, drawer, seconds=0.5) as (api, url):
    late = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a"})
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    stream = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "stream": True})
    assert stream.text.splitlines()[-2:] == ["", ""] or "event: error" in stream.text
    assert '"code": "timeout"' in stream.text
    assert eventually(lambda: api.engine.load == (0, 0))


def test_a_key_is_asked_for_where_one_is_set(checkpoint, monkeypatch):
  with serving(checkpoint, monkeypatch, Drawer(), key="right") as (_, url):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer righté"}):
      reply = httpx.get(f"{url}/v1/models", headers={
          name: value.encode("latin-1") for name, value in headers.items()})
      assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert openai.OpenAI(base_url=f"{url}/v1", api_key="right").models.list().data
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_failure_in_the_engine_is_an_error_in_the_apis_form_and_the_next_request_is_served(
    served, client, drawer, monkeypatch, capfd):
  with monkeypatch.context() as patch:
    patch.setattr(drawer, "_write", lambda *_: 1 / 0)
    for stream in (False, True):
      reply = httpx.post(f"{served[1]}/v1/images/generations",
                         json={"prompt": "a fox", "stream": stream})
      assert "the server failed" in reply.text and "Traceback" not in reply.text
      assert "division" not in reply.text
      assert reply.status_code == (200 if stream else 500)
  assert "ZeroDivisionError" in capfd.readouterr().err
  assert client.images.generate(prompt="a fox").data


def test_a_stopped_server_finishes_what_runs(checkpoint, monkeypatch):
  drawer = Drawer()
  drawer.gate.clear()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with serving(checkpoint, monkeypatch, drawer) as (api, url):
      running = pool.submit(httpx.post, f"{url}/v1/images/generations", json={"prompt": "a"},
                            timeout=30)
      assert eventually(lambda: sum(api.engine.load))
    assert running.result().status_code == 200
    with pytest.raises(httpx.ConnectError):
      httpx.get(f"{url}/health")


def test_the_lines_of_the_readme_and_of_help_work_as_they_stand(
    served, settings, tmp_path, monkeypatch):
  readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("http://127.0.0.1:8000", served[1])
  snippet = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
  curl = re.search(r"^    (curl .*?\n.*?)$", readme, re.MULTILINE)[1]
  monkeypatch.chdir(tmp_path)
  exec(snippet, {})
  assert Image.open("star.png").size == (settings.width, settings.height)
  shown = subprocess.run(["bash", "-c", curl], capture_output=True, check=True)
  prompt = "two red circles left of a blue star"
  assert json.loads(shown.stdout)["data"][0]["revised_prompt"] == text_of(prompt, 0, 1)
  text = help_of("serve")
  for line in (*snippet.splitlines(), *curl.splitlines()):
    assert line.strip().replace(served[1], "http://127.0.0.1:8000") in text


def help_of(verb):
  with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
    commands.make_parser().parse_args([verb, "--help"])
  return out.getvalue()
