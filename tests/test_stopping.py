"""A learned stop, `--rounds auto`: rows whose reflection finds nothing to improve keep their image."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import numpy as np
import openai
import pytest
import test_generate
from engine import SYSTEM_PROMPT, TINY, make_checkpoint
from test_generate import PROMPTS, SEEDS, assert_same

import irg_jax
from irg_jax import commands, storage, weights
from irg_jax.generate import irg, stopping
from irg_jax.generate import settings as settings_lib
from irg_jax.generate.settings import Defaults, Settings, expand, read_defaults
from irg_jax.mini import thoughts
from irg_jax.serve.engine import Engine
from irg_jax.train import watch
from serving import Drawer, serving, text_of

FIXED = dataclasses.replace(test_generate.SETTINGS, rounds=3)
AUTO = dataclasses.replace(FIXED, until_satisfied=True)


@functools.cache
def whole():
  """All rounds of the prompts of test_generate."""
  return test_generate.generate(settings=FIXED)


@functools.cache
def word():
  """A token that ends one or more, but not all, of the rows in their second round."""
  second = [set(t.rounds[1].thought.ids) for t in whole()]
  return min(x for x in set.union(*second) if x and 1 <= sum(x in ids for ids in second) <= 2)


def generate(prompts=PROMPTS, seeds=SEEDS, **options):
  return test_generate.generate(prompts, seeds, AUTO, **{"satisfied": word()} | options)


@functools.cache
def stopped():
  told = []
  return generate(on_result=lambda rounds: told.append(list(rounds))), told


def test_rows_of_a_batch_stop_alone_and_the_others_draw_what_they_draw_anyway():
  rows, _ = stopped()
  lengths = [len(t.rounds) for t in rows]
  assert 2 in lengths and len(set(lengths)) > 1
  for got, want in zip(rows, whole()):
    last = got.rounds[-1]
    assert [r.kept for r in got.rounds] == [False] * (len(got.rounds) - 1) + [last.kept]
    drawn = [r for r in got.rounds if not r.kept]
    assert_same(irg.Trajectory("", drawn), irg.Trajectory("", want.rounds[:len(drawn)]))
    assert last.thought == want.rounds[len(got.rounds) - 1].thought
    assert last.kept == (word() in last.thought.text)
    assert last.kept or len(got.rounds) == FIXED.rounds
    if last.kept:
      assert last.image is got.rounds[-2].image and last.latents is got.rounds[-2].latents
      assert last.passes == 0 and set(last.seconds) == {"think"}


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_that_stops_or_not_is_what_it_is_alone(row):
  alone, = generate([PROMPTS[row]], [SEEDS[row]])
  batch = stopped()[0][row]
  assert_same(batch, alone)
  assert [r.kept for r in batch.rounds] == [r.kept for r in alone.rounds]


def test_nothing_is_drawn_once_all_rows_have_stopped():
  events = []
  # Of IdTokenizer's texts, which are tuples, this is in every one.
  rows = generate(satisfied=_Everything(), on_progress=lambda *event: events.append(event[:2]))
  assert [len(t.rounds) for t in rows] == [2] * 4 and all(t.rounds[1].kept for t in rows)
  assert ("think", 1) in events and not {("draw", 1), ("encode", 1), ("think", 2)} & set(events)


class _Everything:
  """Equal to each token."""

  def __eq__(self, other):
    return True

  __hash__ = None


def test_the_first_thought_never_stops_a_row():
  rows = test_generate.generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(AUTO, rounds=1),
                                satisfied=_Everything())
  assert [r.kept for r in rows[0].rounds] == [False]


def test_a_row_that_stops_compiles_nothing_new():
  generate(satisfied=10**6)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
  assert any(t.rounds[-1].kept for t in generate())
  assert not compiled


def test_a_run_goes_on_from_whatever_it_had_told():
  rows, told = stopped()
  for known, done in enumerate(told, 1):
    later = []
    again = generate(done=done, on_result=later.append)
    assert len(later) == len(told) - known
    for got, want in zip(again, rows):
      assert [r.kept for r in got.rounds] == [r.kept for r in want.rounds]
      for a, b in zip(got.rounds, want.rounds, strict=True):
        assert a.thought == b.thought
        np.testing.assert_array_equal(a.image, b.image)


# --- what is around it


def test_a_number_of_rounds_may_be_auto():
  assert expand({"rounds": "auto"}) == {"rounds": 4, "until_satisfied": True}
  assert expand({"rounds": "auto:7"}) == {"rounds": 7, "until_satisfied": True}
  assert expand({"rounds": 3}) == {"rounds": 3}
  for wrong in ("auto:", "auto:0", "auto:x", "auto4"):
    with pytest.raises(ValueError, match="must be a number, auto"):
      expand({"rounds": wrong})


def test_the_mini_world_says_how_a_content_reflection_reads_and_its_fingerprint_stays(tmp_path):
  assert read_defaults(storage.SHIPPED).satisfied == thoughts.SATISFIED
  text = thoughts.SATISFIED
  assert thoughts.read_faults(f"<think> I see: that. {text} Improvements: none.") == ()
  settings_lib.write_defaults(tmp_path, Defaults(satisfied=text))
  path = tmp_path / "generate.json"
  new, content = weights.fingerprint(tmp_path), json.loads(path.read_text())
  del content["satisfied"]
  storage.write_json(path, content, indent=1)
  assert weights.fingerprint(tmp_path) == new
  storage.write_json(path, content | {"dtype": "bfloat16"}, indent=1)
  assert weights.fingerprint(tmp_path) != new


def test_settings_that_older_runs_recorded_are_those_of_a_fixed_number_of_rounds():
  now = dataclasses.asdict(Settings())
  older = {name: x for name, x in now.items() if name not in ("until_satisfied", "forecast")}
  assert settings_lib.with_new(older, now) == now
  assert settings_lib.with_new(older, dataclasses.asdict(AUTO))["until_satisfied"] is False


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def content(checkpoint, tmp_path):
  """A checkpoint that knows how a reflection reads that finds nothing to improve."""
  folder = shutil.copytree(checkpoint, tmp_path / "content")
  settings_lib.write_defaults(folder, Defaults(
      system_prompt=SYSTEM_PROMPT, settings=TINY, satisfied="all is well"))
  return folder


class Draws:
  """Stands in for `irg.generate`: row i is content with image i + 1; goes on from `done`."""

  def __init__(self, stops, kill=None):
    self.stops, self.kill, self.dones = stops, kill, []

  def __call__(self, model, params, tokenizer, prompts, *, seeds, settings, done=(),
               on_result=None, satisfied="", **_):
    self.dones.append([[(row.kept, row.image is not None) for row in rows] for rows in done])
    rounds, told = list(done), 0
    for number in range(len(done), settings.rounds):
      words = [f"round {number}, {satisfied if self.stops[i] == number else 'more'}"
               for i in range(len(seeds))]
      thoughts = [irg.Thought(text, tuple(tokenizer.encode(text))) for text in words]
      kept = stopping.kept(settings, satisfied, rounds and rounds[-1], thoughts, {})
      rounds.append([last or self._round(thought, seed, number, settings)
                     for last, thought, seed in zip(kept, thoughts, seeds)])
      if all(row.kept for row in rounds[-1]):
        break
      if on_result and number + 1 < settings.rounds:
        on_result(rounds)
        told += 1
        if told == self.kill:
          raise KeyboardInterrupt
    return [irg.Trajectory(p, stopping.own(row)) for p, row in zip(prompts, zip(*rounds))]

  def _round(self, thought, seed, number, settings):
    image = np.full((settings.height, settings.width, 3), 50 * number + seed % 50, np.uint8)
    return irg.Round(thought, np.zeros((4, 8), np.float32), image, {"draw": 1.0}, 7)


@pytest.fixture
def draws(monkeypatch):
  def use(*args):
    found = Draws(*args)
    monkeypatch.setattr(irg, "generate", found)
    return found
  return use


@pytest.mark.parametrize("verb", [
    ["generate", "a fox"], ["eval", "generate", "mini", "--limit", "1"], ["serve"]])
def test_a_checkpoint_that_does_not_say_it_is_refused_before_weights_are_read(
    verb, checkpoint, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("irg_jax.generate.generator.load", None)
  out = ["--out", str(tmp_path / "out")] if verb != ["serve"] else []
  assert commands.main([*verb, "--checkpoint", str(checkpoint), "--rounds", "auto", *out]) == 2
  error = capsys.readouterr().err
  assert "generate.json has no 'satisfied'" in error and "give a number of rounds" in error
  assert not (tmp_path / "out").exists()


def test_without_thinking_it_is_refused(content, tmp_path, capsys):
  assert commands.main(["generate", "a", "--checkpoint", str(content), "--rounds", "auto:3",
                        "--no-think", "--out", str(tmp_path / "out")]) == 2
  assert "without thinking no reflection can end the rounds" in capsys.readouterr().err


def test_evaluations_while_training_refuse_it(content, tmp_path):
  settings_lib.write_defaults(content, Defaults(
      settings=dataclasses.replace(TINY, until_satisfied=True), satisfied="all is well"))
  (tmp_path / "prompts.txt").write_text("a fox\n")
  named = types.SimpleNamespace(prompts=str(tmp_path / "prompts.txt"), benchmark="", generate="")
  asked = types.SimpleNamespace(watch=named, eval_every=1, model=test_generate.CONFIG)
  with pytest.raises(ValueError, match="'until_satisfied' is true.*watch.generate"):
    watch.read_drawing(asked, content)


def test_python_takes_auto_too(content, checkpoint, draws):
  draws([1])
  with pytest.raises(ValueError, match="has no 'satisfied'"):
    irg_jax.load(checkpoint).generate("a fox", rounds="auto")
  result = irg_jax.load(content).generate("a fox", rounds="auto:3")
  assert result.record["settings"]["until_satisfied"] is True
  assert result.record["settings"]["satisfied"] == "all is well"
  assert len(result.images) == 2 and result.record["rounds"][1]["kept"]


def _records(out):
  return [json.loads(path.read_text()) for path in sorted(out.glob("*/trace.json"))]


def test_traces_say_that_an_image_was_kept_and_a_killed_run_goes_on(content, tmp_path, draws):
  run = lambda out: commands.main([
      "generate", "a", "b", "c", "--batch-size", "3", "--checkpoint", str(content), "--rounds",
      "auto:4", "--out", str(out)])
  draws([1, 2, 9])
  assert run(tmp_path / "whole") == 0
  want = _records(tmp_path / "whole")
  assert [[entry.get("kept", False) for entry in r["rounds"]] for r in want] == [
      [False, True], [False, False, True], [False] * 4]
  assert want[0]["rounds"][0]["sha256"] == want[0]["rounds"][1]["sha256"]
  assert (tmp_path / "whole" / "001" / "round2.png").is_file()
  pages = [(tmp_path / "whole" / f"00{i}" / "trace.html").read_text() for i in (1, 2, 3)]
  assert ["image 1 was kept" in pages[0], "image 2 was kept" in pages[1],
          "was kept" in pages[2]] == [True, True, False]
  for kill in (1, 2, 3):
    out = tmp_path / f"killed{kill}"
    draws([1, 2, 9], kill)
    assert run(out) == 130
    assert ["unfinished" in r for r in _records(out)] == [kill < 2, kill < 3, True]
    going_on = draws([1, 2, 9])
    assert run(out) == 0
    assert going_on.dones == [[[(i < number, True) for i in range(3)]
                               for number in range(kill)]]
    assert _records(out) == want


def test_a_run_whose_rows_have_all_stopped_is_complete(content, tmp_path, draws):
  argv = ["generate", "a", "b", "--batch-size", "2", "--checkpoint", str(content), "--rounds",
          "auto", "--out", str(tmp_path / "out")]
  draws([1, 1])
  assert commands.main(argv) == 0
  again = draws([1, 1])
  assert commands.main(argv) == 0 and not again.dones
  # A fixed number of rounds is another run.
  assert commands.main([*argv, "--rounds", "4"]) == 0 and again.dones == [[]]


def test_a_trace_with_a_fixed_number_of_rounds_has_no_new_fields(content, tmp_path, draws):
  draws([9])
  assert commands.main(["generate", "a", "--checkpoint", str(content), "--out",
                        str(tmp_path / "out")]) == 0
  record = json.loads((tmp_path / "out" / "trace.json").read_text())
  assert not {"until_satisfied", "satisfied"} & set(record["settings"])
  assert not any("kept" in entry for entry in record["rounds"])


def test_the_images_of_a_benchmark_are_complete_in_all_rounds(content, tmp_path, draws, capsys):
  out = tmp_path / "out"
  argv = ["eval", "generate", "mini", "--limit", "1", "--checkpoint", str(content), "--out",
          str(out), "--rounds", "auto:4", "--batch-size", "2"]
  draws([1, 9])
  assert commands.main(argv) == 0
  kept, full = (json.loads(path.read_text()) for path in sorted(
      path for path in (out / "traces").rglob("*.json"))[:2])
  files = lambda record: [(out / entry["picture"]).read_bytes() for entry in record["rounds"]]
  assert len(files(kept)) == 4 and len(set(files(kept))) == 1 and len(set(files(full))) == 4
  assert [entry.get("kept", False) for entry in kept["rounds"]] == [False, True, True, True]
  assert [entry["think"] is None for entry in kept["rounds"]] == [False, False, True, True]
  assert [entry["passes"] for entry in kept["rounds"]] == [7, 0, 0, 0]
  again = draws([1, 9])
  assert commands.main(argv) == 0 and not again.dones
  assert commands.main([*argv, "--rounds", "4"]) == 2
  assert "until_satisfied" in capsys.readouterr().err


# --- served


@pytest.fixture
def client(content, monkeypatch):
  """Of a server that was started with --rounds auto:3; seed 5 is content with its first image."""
  pytest.importorskip("uvicorn")
  settings_lib.write_defaults(content, Defaults(
      settings=dataclasses.replace(TINY, rounds=3, until_satisfied=True), satisfied="seed 5"))
  with serving(content, monkeypatch, Drawer()) as (_, url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
      yield made


def test_a_served_row_stops_alone_and_its_reply_says_so(client):
  both = client.images.generate(prompt="a fox", n=2, extra_body={"seed": 5})
  kept, other = (image.irg["rounds"] for image in both.data)
  assert [r.get("kept", False) for r in kept] == [False, True]
  assert [r.get("kept", False) for r in other] == [False] * 3
  assert both.data[0].b64_json == kept[0]["b64_json"] == kept[1]["b64_json"]
  assert both.data[0].revised_prompt == text_of("a fox", 5, 1)
  assert both.usage.output_tokens_details.image_tokens == 6 * (1 + 3)  # what was drawn
  fixed = client.images.generate(prompt="a fox", extra_body={"seed": 5, "rounds": 1})
  assert len(fixed.data[0].irg["rounds"]) == 1


def test_what_is_streamed_of_a_row_that_stops_is_what_is_returned(client):
  events = list(client.images.generate(prompt="a fox", stream=True, extra_body={"seed": 5}))
  images = [e for e in events if e.type != "irg.thought.delta"]
  assert [e.type.split(".")[1] for e in images] == ["partial_image", "completed"]
  assert images[0].b64_json == images[1].b64_json
  ask = lambda **more: client.chat.completions.create(
      model="tiny", messages=[{"role": "user", "content": "a fox"}], seed=5,
      extra_body={"modalities": ["image"]}, **more)
  message, content, images = ask().choices[0].message, "", []
  for chunk in ask(stream=True):
    content += chunk.choices[0].delta.content or ""
    images += getattr(chunk.choices[0].delta, "images", None) or []
  assert content == message.content == text_of("a fox", 5, 1) and images == message.images


def test_the_engine_compiles_all_rounds_whatever_the_thoughts_say(content, monkeypatch):
  settings_lib.write_defaults(content, Defaults(
      settings=dataclasses.replace(TINY, until_satisfied=True), satisfied="a plan"))
  cases = Engine._samples
  with serving(content, monkeypatch, Drawer()) as (api, _):
    works = list(cases(api.engine, 48, 32))
  assert works and not any(w.settings.until_satisfied for w in works)
