"""The page of `irg demo`: what it shows of a request, with an engine that only pretends; and in
Chromium, where there is one, against a server of the default model."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
import uvicorn

from conftest import ROOT
from irg_jax.generate import generator, irg
from irg_jax.images import decode_image, encode_image
from irg_jax.serve import api as api_lib
from irg_jax.serve import demo, metrics, replies, run
from irg_jax.serve.engine import Closing, Full
from irg_jax.serve.showing import Showing
from irg_jax.serve.work import Event, Limits, Row

PROMPT = "two red circles left of a blue star"
SECONDS = {"think": 0.5, "draw": 1.0}


class Pretender:
  """Stands for an `engine.Engine`: tells scripted events, from a thread of its own."""

  ready = threading.Event()

  def __init__(self, loaded, script=None, refuse=None, **limits):
    self.generator, self.settings = loaded, loaded.settings
    self.system_prompt, self.metrics = loaded.defaults.system_prompt, metrics.Metrics()
    self.limits, self.load, self.serves = Limits(sizes=((64, 64),), **limits), (0, 0), True
    self.rows, self._script, self._refuse = [], script or story, refuse

  def submit(self, works, tell):
    if self._refuse:
      raise self._refuse
    row = Row(works[0], lambda event: tell(0, event))
    self.rows.append(row)

    def tell_all():
      for event in self._script(row.work):
        row.tell(event)

    threading.Thread(target=tell_all, daemon=True).start()
    return [row]


def drawn(work, number):
  """The round of a number, whose image follows from the seed."""
  image = np.random.default_rng(work.seed + number).integers(0, 256, (64, 64, 3), np.uint8)
  return irg.Round(irg.Thought(f"thought {number} of {work.prompt}", (1, 2)), None, image, SECONDS)


def story(work):
  """The events that an engine tells of a work that draws."""
  rounds = [drawn(work, number) for number in range(work.settings.rounds)]
  for number, found in enumerate(rounds):
    for end in (7, 9, None):
      yield Event("text", found.thought.text[:end], number)
    yield Event("round", found, number)
  yield Event("done", rounds)


def answer(work):
  yield Event("text", "It is")
  yield Event("done", irg.Thought("It is <b>red</b>.", (1,), hit_limit=True))


def silence(work):
  return []


@pytest.fixture(scope="module")
def loaded(on_one_device):
  return generator.load()


@pytest.fixture
def showing(loaded):
  return made(Pretender(loaded))


def made(engine):
  return Showing(engine, replies.Links(), "mini")


def all_of(steps):
  """The values that an async generator yields."""
  async def collect():
    return [step async for step in steps]
  return asyncio.run(collect())


def images(showing, html):
  """The images of a piece of HTML, uint8 [Y, X, 3]."""
  return [decode_image(showing._links.get(name), name)
          for name in re.findall(r'src="images/([^"]+)"', html)]


def trace_of(showing, html):
  """(trace.json, images) of the trace that a piece of HTML links."""
  return unpacked(showing.traces.get(re.search(r'href="traces/([^"]+)"', html)[1]))


def unpacked(data):
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    assert {"trace/trace.html", "trace/trace.json"} <= set(archive.namelist())
    record = json.loads(archive.read("trace/trace.json"))
    return record, [decode_image(archive.read(f"trace/{entry['picture']}"), "round")
                    for entry in record["rounds"]]


def test_the_thought_grows_then_images_come_and_equal_the_engines(showing):
  steps = all_of(showing.draw("me", PROMPT, seed="7"))
  first, second = (drawn(showing._engine.rows[0].work, number) for number in range(2))
  grown = ["thought", "thought 0", first.thought.text, "thought", "thought 1", second.thought.text]
  seen = [text for step in steps for text in re.findall(r'<div class="thought"[^>]*>(.*?)</div>',
                                                        step)[-1:]]
  assert list(dict.fromkeys(seen)) == list(dict.fromkeys(grown))
  assert [len(images(showing, step)) for step in steps] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
  for got, want in zip(images(showing, steps[-1]), (first, second)):
    np.testing.assert_array_equal(got, want.image)
  assert "data-done" in steps[-1] and not any("data-done" in step for step in steps[:-1])
  assert steps[-1].count('class="tiny"') == 2


def test_a_row_that_stops_early_shows_its_rounds_alone_and_says_that_the_image_was_kept(loaded):
  def content(work):
    first = drawn(work, 0)
    last = dataclasses.replace(first, thought=irg.Thought("all is well"), kept=True)
    yield Event("round", first, 0)
    yield Event("round", last, 1)
    yield Event("done", [first, last])

  showing = made(Pretender(loaded, content, rounds=4))
  *_, before, _, end = all_of(showing.draw("me", PROMPT, seed="7", rounds=4))
  assert before.count('class="blank') == 3 and "was kept" not in before
  assert len(images(showing, end)) == 2 and 'class="blank' not in end
  assert "image 1 was kept" in end and "final" in end
  assert trace_of(showing, end)[0]["rounds"][1]["kept"]


def test_the_trace_is_what_the_engine_drew_and_names_no_folder_of_the_server(showing):
  end = all_of(showing.draw("me", PROMPT, seed="7", rounds=2))[-1]
  record, pictures = trace_of(showing, end)
  work = showing._engine.rows[0].work
  assert (record["prompt"], record["seed"]) == (PROMPT, 7)
  assert record["settings"]["rounds"] == 2 and record["checkpoint"] == "mini"
  assert str(showing._engine.generator.checkpoint) not in json.dumps(record)
  assert [entry["think"] for entry in record["rounds"]] == [
      drawn(work, number).thought.text for number in range(2)]
  for number, picture in enumerate(pictures):
    np.testing.assert_array_equal(picture, drawn(work, number).image)


def test_fields_reach_the_work_and_empty_ones_are_left_out(showing):
  all_of(showing.draw("me", PROMPT, size="64x64", rounds=1, seed=" 5 ", num_inference_steps=3,
                      guidance_scale=2.5, true_cfg_scale=1.5))
  all_of(showing.draw("me", PROMPT, seed="", rounds=None))
  one, other = (row.work for row in showing._engine.rows)
  assert (one.seed, one.settings.rounds, one.settings.steps) == (5, 1, 4)
  assert (one.settings.first.text_scale, one.settings.later.image_scale) == (2.5, 1.5)
  assert other.settings == showing._engine.settings


@pytest.mark.parametrize("prompt, options, word", [
    ("", {}, "empty"), ("   ", {}, "empty"), (None, {}, "no text"),
    (PROMPT, {"seed": "x"}, "seed"), (PROMPT, {"seed": "-1"}, "seed"),
    (PROMPT, {"seed": str(2**40)}, "seed"), (PROMPT, {"rounds": 99}, "rounds"),
    (PROMPT, {"rounds": "nan"}, "rounds"), (PROMPT, {"num_inference_steps": 10**9}, "allows"),
    (PROMPT, {"guidance_scale": float("nan")}, "guidance_scale"),
    (PROMPT, {"size": "9999999999x1"}, "size"), (PROMPT * 40, {}, "tokens"),
    (PROMPT, {"files": [b"no image"]}, "not an image"), (PROMPT, {"files": [None]}, "choose"),
    (PROMPT, {"files": [encode_image(np.zeros((8, 8, 3)))] * 3}, "3 images")])
def test_a_request_that_cannot_be_served_is_a_message(showing, prompt, options, word):
  end = all_of(showing.draw("me", prompt, **options))[-1]
  assert word in end and 'role="alert"' in end and "Traceback" not in end
  assert not showing._engine.rows and not showing.busy


@pytest.mark.parametrize("refuse, word", [
    (Full(7), "Try again in 7 seconds"), (Closing(), "about to stop"),
    (RuntimeError("/secret"), "its log says why")])
def test_an_engine_that_refuses_or_fails_is_a_message(loaded, refuse, word):
  end = all_of(made(Pretender(loaded, refuse=refuse)).draw("me", PROMPT))[-1]
  assert word in end and "secret" not in end


def test_a_row_that_fails_or_takes_too_long_is_a_message(loaded):
  failing = made(Pretender(loaded, lambda work: [Event("failed", RuntimeError("/secret"))]))
  end = all_of(failing.draw("me", PROMPT))[-1]
  assert "its log says why" in end and "secret" not in end
  late = made(Pretender(loaded, silence, seconds=0.05))
  assert "longer than 0.05 seconds" in all_of(late.draw("me", PROMPT))[-1]
  assert late._engine.rows[0].cancelled and not late.busy


def test_stop_frees_the_rows_of_its_session_alone(loaded):
  showing = made(Pretender(loaded, silence))

  async def check():
    mine, yours = (showing.draw(name, PROMPT) for name in ("me", "you"))
    await anext(mine), await anext(yours)
    showing.stop("me")
    showing.stop("nobody")
    end = [step async for step in mine][-1]
    first, second = showing._engine.rows
    assert "Stopped." in end and first.cancelled and not second.cancelled and showing.busy
    await yours.aclose()  # the page is gone
    assert second.cancelled and not showing.busy

  asyncio.run(check())


def test_many_sessions_run_at_once_and_none_is_crossed(loaded):
  showing = made(Pretender(loaded))

  async def all_at_once():
    async def one(seed):
      return [step async for step in showing.draw(f"page {seed}", PROMPT, seed=str(seed))][-1]
    return await asyncio.gather(*(one(seed) for seed in range(0, 32, 4)))

  for seed, end in zip(range(0, 32, 4), asyncio.run(all_at_once())):
    want = [drawn(types.SimpleNamespace(seed=seed, prompt=PROMPT), n).image for n in range(2)]
    np.testing.assert_array_equal(images(showing, end), want)


def test_an_edit_shows_its_image_and_the_note_of_a_model_that_cannot_edit(showing):
  source = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  end = all_of(showing.draw("me", PROMPT, [encode_image(source)]))[-1]
  assert "never trained to edit" in end and "Image to edit" in end
  np.testing.assert_array_equal(images(showing, end)[0], source)


def test_an_answer_grows_and_questions_have_bounds(loaded):
  showing = made(Pretender(loaded, answer))
  steps = all_of(showing.ask("me", "What color?", [encode_image(np.zeros((64, 64, 3)))]))
  assert "It is" in steps[1] and "data-done" not in steps[1]
  assert "It is &lt;b&gt;red&lt;/b&gt;." in steps[-1] and "length limit" in steps[-1]
  conversation = showing._engine.rows[0].work.conversation
  assert conversation[0].shape == (64, 64, 3) and conversation[1] == "What color?"
  for question, files in (("", ()), (None, ()), ("a " * 9999, ()), ("a", [b"", b""])):
    assert 'role="alert"' in all_of(showing.ask("me", question, files))[-1]


def test_script_in_texts_is_shown_not_obeyed(loaded):
  evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e"

  def script(work):
    found = irg.Round(irg.Thought(evil), None, np.zeros((64, 64, 3), np.uint8), SECONDS)
    yield Event("text", evil)
    yield Event("round", found)
    yield Event("done", [found])

  showing = made(Pretender(loaded, script))
  steps = all_of(showing.draw("me", f"red ring {evil[:40]}", rounds=1))
  for html in (*steps, showing.gallery("me")):
    assert "<script" not in html and "<img src=x" not in html and "\u202e" not in html
  assert "&lt;script&gt;" in steps[-1]


def test_the_gallery_is_bounded_and_belongs_to_its_session(showing):
  for seed in range(26):
    all_of(showing.draw("me", PROMPT, seed=str(seed), rounds=1))
  gallery = showing.gallery("me")
  assert gallery.count('class="entry"') == 24
  assert "seed 25 " in gallery and "seed 1 " not in gallery
  assert "entry" not in showing.gallery("you")
  for number in range(300):
    showing._galleries.setdefault(f"page {number}", ())
  all_of(showing.draw("last", PROMPT, rounds=1))
  assert len(showing._galleries) <= 301 and showing.gallery("last").count('class="entry"') == 1


def test_the_examples_are_prompts_that_the_model_knows(showing):
  read = showing._engine.generator.defaults.read
  assert len(showing.examples) >= 3
  assert not any(read(prompt, showing._engine.settings).note for prompt in showing.examples)


def test_the_page_says_that_the_first_image_waits_for_the_compilation(showing):
  assert "compiles" not in showing.banner()
  showing._engine.serves = False
  assert "compiles" in showing.banner() and "compiled" in all_of(showing.draw("me", PROMPT))[0]


@contextlib.contextmanager
def paged(engine, key=None):
  """Yields the URL of a page on an engine that pretends, served from this process."""
  api, seen = api_lib.Server(engine, "mini", key), []

  @contextlib.asynccontextmanager
  async def lifespan(_):
    seen.append("started")
    yield
    seen.append("closed")

  server = run._Server(api, uvicorn.Config(demo.page(api, api.app(lifespan)), log_level="error"))
  with socket.create_server(("127.0.0.1", 0)) as listener:
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
      yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
      server.should_exit = True
      thread.join(60)
  assert not thread.is_alive() and seen == ["started", "closed"]


def until(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def open_page(tab, url, width=1280):
  tab.open(f"{url}/", width)
  tab.wait("document.querySelector('button.primary') && document.querySelector('.label-wrap')")


DONE = "document.querySelector('.irg.panel[data-done]')"
NOTE = "document.querySelector('.irg.panel .note')"


def test_the_stop_button_and_closing_the_page_free_the_row(loaded, tab):
  engine = Pretender(loaded, silence)
  with paged(engine) as url:
    open_page(tab, url)
    tab.write("textarea", PROMPT)
    tab.click("button.primary")
    until(lambda: len(engine.rows) == 1)
    tab.wait("document.querySelector('.irg.panel .status')")
    assert not engine.rows[0].cancelled
    tab.click("button.secondary")
    tab.wait(NOTE)
    assert tab.value(f"{NOTE}.innerText") == "Stopped." and engine.rows[0].cancelled
    tab.click("button.primary")
    until(lambda: len(engine.rows) == 2)
    tab.open("about:blank", 1280)
    until(lambda: engine.rows[1].cancelled)
    open_page(tab, url)  # a new page is served, and the server ends with it open


def test_the_tabs_edit_and_ask_send_the_image_as_it_was_chosen(loaded, tab, tmp_path):
  source = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  (tmp_path / "image.png").write_bytes(encode_image(source))
  (tmp_path / "broken.png").write_bytes(encode_image(source)[:200])
  engine = Pretender(loaded, lambda work: (answer if work.conversation else story)(work))
  find = lambda what: f"document.querySelector(\"{what}\")"
  with paged(engine) as url:
    open_page(tab, url)
    for name, word in (("edit", "Image to edit"), ("ask", "Answer")):
      tab.value("[...document.querySelectorAll('button[role=tab]')].findLast("
                f"e => e.innerText.toLowerCase() == '{name}').click()")
      tab.wait(find(f"#{name} input[type=file]"))
      tab.write(f"#{name} textarea", PROMPT)
      tab.upload(f"#{name} input[type=file]", tmp_path / "broken.png")
      tab.wait(find(f"#{name} [aria-label='Remove Image']"))
      tab.click(f"#{name} button.primary")
      tab.wait(find(f"#{name} .note.fault"))
      assert "not an image" in tab.value(find(f"#{name} .note") + ".innerText")
      tab.click(f"#{name} [aria-label='Remove Image']")
      tab.wait("!" + find(f"#{name} [aria-label='Remove Image']"))
      tab.upload(f"#{name} input[type=file]", tmp_path / "image.png")
      tab.wait(find(f"#{name} [aria-label='Remove Image']"))
      tab.click(f"#{name} button.primary")
      tab.wait(find(f"#{name} [data-done]") + f"?.innerText.includes('{word}')")
  edit, ask = (row.work for row in engine.rows)
  np.testing.assert_array_equal(edit.images[0], source)
  np.testing.assert_array_equal(ask.conversation[0], source)
  assert edit.prompt == ask.conversation[1] == PROMPT


def test_script_in_a_prompt_and_a_full_queue_are_shown_in_the_browser(loaded, tab):
  evil = "<img src=x onerror=document.title=1>${document.title=2}{{value}}"
  with paged(Pretender(loaded, refuse=Full(7))) as url:
    open_page(tab, url)
    tab.write("textarea", PROMPT)
    tab.click("button.primary")
    tab.wait(NOTE)
    assert tab.value(f"{NOTE}.innerText") == "The queue is full. Try again in 7 seconds."
  with paged(Pretender(loaded)) as url:
    open_page(tab, url)
    tab.write("textarea", evil)
    tab.click("button.primary")
    tab.wait(DONE)
    assert tab.value("document.querySelector('.irg .prompt').innerText") == evil
    tab.wait("document.querySelector('.irg .entry')")
    assert tab.value("document.title") == "irg demo"


def test_the_page_asks_for_the_key_and_bounds_what_is_sent(loaded):
  with paged(Pretender(loaded, body=5_000), key="secret") as url:
    page = fetch(f"{url}/config")
    assert page[0] == 401 and b"components" not in page[1]
    assert fetch(f"{url}/v1/models")[0] == 401
    assert fetch(f"{url}/gradio_api/queue/join", {"data": ["x" * 6_000]})[0] == 413
    login = lambda key: fetch(f"{url}/login", form=f"username=a&password={key}")
    assert login("wrong")[0] == 400 and login("secret")[0] == 200
    with urllib.request.urlopen(f"{url}/") as reply:
      assert "default-src 'self'" in reply.headers["Content-Security-Policy"]


@contextlib.contextmanager
def served(*flags, **variables):
  """Yields (URL, process) of an `irg demo` of the default model."""
  words = [sys.executable, "-m", "irg_jax", "demo", "--port", "0", "--batch-size", "1", *flags]
  plain = {name: value for name, value in os.environ.items() if name != "IRG_API_KEY"}
  process = subprocess.Popen(
      words, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=plain | variables | {
          "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
  try:
    lines = iter(process.stderr.readline, "")
    found = next(filter(None, (re.search(r"http://\S+:\d+", line) for line in lines)), None)
    assert found, "the server ended"
    threading.Thread(target=list, args=(lines,), daemon=True).start()
    yield found[0], process
  finally:
    process.kill()
    process.wait()
    process.stderr.close()


def fetch(url, body=None, form=None):
  """(status, content) of an HTTP request, with JSON or a form if there is one."""
  data = (form or (json.dumps(body) if body else "")).encode() or None
  headers = {"Content-Type": "application/json"} if body else {}
  try:
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as reply:
      return reply.status, reply.read()
  except urllib.error.HTTPError as e:
    return e.code, e.read()


@pytest.mark.long
def test_a_browser_draws_and_the_process_ends_with_the_page_open(tmp_path, tab):
  """Thought, both images, trace, gallery; nothing from elsewhere; SIGTERM.

  With IRG_SCREENSHOTS=FOLDER, writes the screenshots of docs/ there.
  """
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  with served(TMPDIR=str(temporary)) as (url, process):
    open_page(tab, url)
    tab.requested.clear()
    open_page(tab, url)
    tab.write("textarea", PROMPT)
    tab.write("[placeholder='drawn anew']", "7")
    tab.click("button.primary")
    tab.wait("document.querySelector('.irg .said .thought')?.innerText.length > 10", 240)
    assert not tab.value(f"Boolean({DONE})")
    tab.wait(DONE, 120)
    assert tab.value("document.querySelector('.irg.panel').innerText").count("red circle") > 2
    tab.wait("[...document.querySelectorAll('.irg .figure img')].filter("
             "e => e.complete && e.naturalWidth == 64).length == 2")
    tops = tab.value("[...document.querySelectorAll('.irg .figure img')].map("
                     "e => e.getBoundingClientRect()).map(r => [r.top, r.width])")
    assert tops[0][0] == tops[1][0] and tops[0][1] > 256
    assert tab.value("getComputedStyle(document.querySelector('.irg .figure img'))"
                     ".imageRendering") == "pixelated"
    tab.wait("document.querySelector('.irg .entry img')")
    status, data = fetch(tab.value("document.querySelector('.irg a.trace').href"))
    record, pictures = unpacked(data)
    assert status == 200 and (record["prompt"], record["seed"]) == (PROMPT, 7)
    status, reply = fetch(f"{url}/v1/images/generations", {"prompt": PROMPT, "seed": 7})
    told = json.loads(reply)["data"][0]["irg"]["rounds"]
    assert [r["thought"] for r in told] == [r["think"] for r in record["rounds"]]
    for entry, picture in zip(told, pictures, strict=True):
      got = decode_image(base64.b64decode(entry["b64_json"]), "round")
      np.testing.assert_array_equal(got, picture)
    elsewhere = [u for u in tab.requested if not u.startswith((url, "data:", "blob:"))]
    assert not elsewhere
    for path, want in (("/v1/models", 200), ("/metrics", 200), ("/v1/nothing", 404),
                       ("/traces/x.zip", 404)):
      assert fetch(url + path)[0] == want, path
    for name, width in (("demo", 1280), ("demo_phone", 390)):
      tab.resize(width)
      assert tab.value("document.documentElement.scrollWidth") <= width
      if folder := os.environ.get("IRG_SCREENSHOTS"):
        time.sleep(1)
        tab.screenshot(pathlib.Path(folder) / f"{name}.png")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
  assert not list(temporary.glob("irg-demo-*"))
