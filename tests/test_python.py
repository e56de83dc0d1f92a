"""`irg_jax.load` in Python gives what the command line gives, refuses what it refuses.

Drawing is replaced by a stand-in whose images follow from all that it is called with; the long
tests, and one of tests/test_cli_run.py, really draw.
"""

import dataclasses
import json
import pydoc

import jax
import numpy as np
import pytest
from PIL import Image

import irg_jax
from conftest import ROOT
from engine import SYSTEM_PROMPT, TINY, make_checkpoint, stand_in
from irg_jax import commands
from irg_jax.generate import answer, generator, irg
from irg_jax.generate.settings import Guidance


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def loaded(checkpoint):
  return irg_jax.load(checkpoint)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.long)])
def engine(request, monkeypatch):
  """`irg.generate`, or a stand-in."""
  if request.param == "stand-in":
    monkeypatch.setattr(irg, "generate", stand_in)


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "photo.png"
  levels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
  Image.fromarray(levels).save(path)
  return path


def by_command(checkpoint, out, *argv):
  assert commands.main(["generate", "--checkpoint", str(checkpoint), "--out", str(out), *argv]) == 0
  return out


def content(folder):
  """The files of a trace: bytes of images, and the record without seconds."""
  record = json.loads((folder / "trace.json").read_text())
  assert all(entry.pop("seconds") for entry in record["rounds"])
  return record, {path.name: path.read_bytes() for path in folder.glob("*.png")}


def assert_same(result, folder, tmp_path):
  result.save(tmp_path / "python")
  assert content(tmp_path / "python") == content(folder)
  record, pngs = content(folder)
  assert result.thoughts == [entry["think"] for entry in record["rounds"]]
  for number, image in enumerate(result.images, 1):
    np.testing.assert_array_equal(image, Image.open(folder / f"round{number}.png"))
  assert (tmp_path / "python" / "trace.html").is_file() and len(pngs) == len(result.images)


def test_with_the_defaults_of_the_checkpoint_it_gives_what_the_command_line_gives(
    engine, checkpoint, loaded, tmp_path):
  result = loaded.generate("a fox ", seed=3)
  out = by_command(checkpoint, tmp_path / "out", "a fox ", "--seed", "3")
  assert_same(result, out, tmp_path)
  record, _ = content(out)
  assert record["system_prompt"] == SYSTEM_PROMPT and result.image.shape == (32, 48, 3)
  assert (record["settings"]["dtype"], record["settings"]["mesh"]) == (
      loaded.model.config.dtype, {a: n for a, n in loaded.mesh.shape.items() if n > 1})


def test_with_changed_settings_it_gives_what_the_command_line_gives(
    engine, checkpoint, loaded, tmp_path):
  result = loaded.generate(
      "a fox", seed=np.int64(4), rounds=3, text_scale=2, temperature=np.float32(0.5),
      system_prompt="", later={"interval": (0.2, 1), "renorm_min": 0.5})
  (tmp_path / "none.txt").write_text("")
  out = by_command(
      checkpoint, tmp_path / "out", "a fox", "--seed", "4", "--rounds", "3", "--text-scale", "2",
      "--temperature", "0.5", "--system-prompt-file", str(tmp_path / "none.txt"),
      "--config.later.interval=(0.2, 1)", "--config.later.renorm_min=0.5")
  assert_same(result, out, tmp_path)


def test_a_list_of_prompts_runs_in_batches_as_on_the_command_line(
    engine, checkpoint, loaded, tmp_path):
  prompts = ["a fox", "two big dogs", "rain"]
  results = loaded.generate(prompts, seed=8, batch_size=2, rounds=1, think=False)
  out = by_command(checkpoint, tmp_path / "out", *prompts, "--seed", "8", "--batch-size", "2",
                   "--rounds", "1", "--no-think")
  assert [r.prompt for r in results] == prompts and results[0].thoughts == [None]
  for number, result in enumerate(results, 1):
    assert_same(result, out / f"{number:03}", tmp_path / str(number))


def test_an_edit_gives_what_the_command_line_gives_whatever_holds_the_image(
    engine, checkpoint, loaded, photo, tmp_path):
  result = loaded.edit("more rain", photo, rounds=1, seed=2)
  out = by_command(checkpoint, tmp_path / "out", "more rain", "--image", str(photo),
                   "--rounds", "1", "--seed", "2")
  assert_same(result, out, tmp_path)
  for image in (str(photo), Image.open(photo), np.array(Image.open(photo)),
                jax.numpy.asarray(Image.open(photo))):
    again = loaded.generate("more rain", images=image, rounds=1, seed=2)
    np.testing.assert_array_equal(again.image, result.image)


def test_a_question_reaches_the_engine_with_the_defaults_of_the_checkpoint(
    loaded, photo, monkeypatch):
  calls = []
  monkeypatch.setattr(answer, "answer", lambda *args, **options: (
      calls.append((args[3], options)), [irg.Thought("a fox")])[1])
  assert loaded.ask(" what is it ", photo, seed=5, think_limit=9) == "a fox"
  (((image, question),), options), = calls
  np.testing.assert_array_equal(image, Image.open(photo))
  assert question == "what is it" and options == {
      "seeds": [5], "settings": dataclasses.replace(TINY, think_limit=9),
      "system_prompt": SYSTEM_PROMPT, "on_text": None}


@pytest.mark.long
def test_an_answer_is_that_of_the_engine(loaded, photo):
  for images in ([], [photo]):
    arrays, _ = generator.read_images(images)
    with jax.set_mesh(loaded.mesh):
      wanted, = answer.answer(
          loaded.model, loaded.params, loaded.tokenizer, [[*arrays, "what is it"]], seeds=[5],
          settings=TINY, system_prompt=SYSTEM_PROMPT)
    assert loaded.ask(" what is it", *images, seed=5) == wanted.text


@pytest.mark.parametrize("changes, argv", [
    ({}, []),
    ({"size": 64}, ["--size", "64"]),
    ({"size": (48, 64)}, ["--size", "48x64"]),
    ({"size": [np.int64(48), 64]}, ["--size", "48x64"]),
    ({"text_scale": 2, "image_scale": 3}, ["--text-scale", "2", "--image-scale", "3"]),
    ({"later": {"renorm": "global"}}, ["--config.later.renorm=global"]),
    ({"later": Guidance(renorm="global")}, [
        "--config.later.renorm=global", "--config.later.image_scale=1",
        "--config.later.interval=(0.4, 1)"]),
    ({"later": {"text_scale": 1}, "text_scale": 3}, [
        "--config.first.text_scale=3", "--config.later.text_scale=1"]),
    ({"think": False, "rounds": 1}, ["--no-think", "--rounds", "1"]),
    ({"temperature": 0}, ["--greedy"]),
    ({"window": 1, "top_k": 5, "top_p": 1}, ["--window", "1", "--top-k", "5", "--top-p", "1"]),
])
def test_a_setting_means_what_its_flag_means(checkpoint, loaded, changes, argv):
  argv = ["generate", "a fox", "--checkpoint", str(checkpoint), *argv]
  overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
  args = commands.make_parser().parse_args([a for a in argv if not a.startswith("--config.")])
  wanted = commands.generate.make_inputs(args, overrides)
  got, system_prompt = loaded._chosen(None, None, changes)
  assert (got, system_prompt) == (wanted.settings, wanted.system_prompt)
  assert repr(got) == repr(wanted.settings)  # numbers of the same type


@pytest.mark.parametrize("prompts, options, message", [
    ("a fox", {"round": 1}, r"unknown setting 'round'; did you mean rounds\? \(known: rounds, "),
    ("a fox", {"guidance": 1}, r"unknown setting 'guidance' \(known: .*text_scale.*size\)"),
    ("a fox", {"later": {"scale": 1}}, "'later.scale' is unknown; known: text_scale"),
    ("a fox", {"later": 2}, "'later' is 2, but must be a group"),
    ("a fox", {"rounds": 0}, "'rounds' is 0"),
    ("a fox", {"rounds": "2"}, "'rounds' is '2', but must be int"),
    ("a fox", {"size": 50}, "50 is not a positive multiple of 16"),
    ("a fox", {"size": (1, 2, 3)}, r"size is \(1, 2, 3\), but must be \(width, height\)"),
    ("a fox", {"seed": -1}, "seed -1: must be"),
    ("a fox", {"seed": 1.5}, "seed 1.5: must be an integer"),
    (["a fox", "rain"], {"seed": 2**32 - 1}, r"seed 4294967295: .*\(seed \+ 1\) below 2\*\*32"),
    ("a fox", {"batch_size": 0}, "batch_size 0: must be 1 or more"),
    (" ", {}, "prompt 1 is empty"),
    ([], {}, "no prompt"),
    (["a fox", ""], {}, "prompt 2 is empty"),
    (["a fox", 3], {}, "prompt 2 is no text but a int"),
    ("a \ud800 fox", {}, "prompt 1 is not UTF-8"),
    (["a fox", "a" * 300], {}, "prompt 2 has 300 tokens, more than the 256"),
    ("a fox", {"images": "no.png"}, "no.png: cannot read the image"),
    ("a fox", {"images": [np.zeros((32, 32, 3))]}, r"image 1 is float64 \[32, 32, 3\]"),
    ("a fox", {"images": np.zeros((32, 32), np.uint8)}, r"image 1 is uint8 \[32, 32\]"),
    ("a fox", {"system_prompt": "a" * 5000, "cache_size": 100}, "cache_size 100 is too small"),
])
def test_what_cannot_work_is_named_before_anything_is_computed(
    loaded, monkeypatch, prompts, options, message):
  monkeypatch.setattr(generator.irg, "generate", None)
  with pytest.raises(ValueError, match=message):
    loaded.generate(prompts, **options)


@pytest.mark.parametrize("question, images, options, message", [
    ("", (), {}, "prompt 1 is empty"),
    ("a fox?", ("no.png",), {}, "no.png: cannot read the image"),
    ("a fox?", (), {"think_limits": 3}, "did you mean think_limit"),
    ("a fox?", (), {"temperature": -1}, "'temperature' is -1"),
    ("a fox?", (), {"seed": -1}, "seeds must be from 0"),
])
def test_a_question_that_cannot_work_is_named(loaded, question, images, options, message):
  with pytest.raises(ValueError, match=message):
    loaded.ask(question, *images, **options)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    irg_jax.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="llm_config.json"):
    irg_jax.load(tmp_path)


def test_a_result_shows_itself(loaded):
  rounds = [{"think": text, "think_tokens": 1, "hit_limit": False, "seconds": {},
             "picture": np.full((4, 4, 3), 9, np.uint8)} for text in ("two <red> things", "fine")]
  result = generator.Result({"prompt": "a & b", "note": "It knows foxes.", "rounds": rounds})
  page = result._repr_html_()
  assert page.count("data:image/png;base64,") == 2
  assert all(text in page for text in ("a &amp; b", "It knows foxes.", "&lt;red&gt;", "fine"))
  assert repr(result) == "Result('a & b', 2 images)" and result.note == "It knows foxes."
  assert len(repr(loaded)) < 200 and loaded.model.config.dtype in repr(loaded)
  drawn = irg.Round(irg.Thought("fine"), np.zeros((9, 9)), result.image, {})
  assert "array" not in repr(irg.Trajectory("a fox", [drawn, drawn]))


@pytest.mark.parametrize("thing", [irg_jax, irg_jax.load, generator.Generator.generate,
                                   generator.Generator.edit, generator.Generator.ask],
                         ids=lambda thing: thing.__name__)
def test_help_fits_a_screen(thing):
  lines = pydoc.render_doc(thing, renderer=pydoc.plaintext).splitlines()
  assert 4 <= len(lines) <= 60  # that of the package ends with its modules
  assert len(lines) <= 30 or thing is irg_jax


def test_the_version_is_in_one_place():
  assert irg_jax.__version__ and "load" in dir(irg_jax)
  assert "version = attr: irg_jax.__version__" in (ROOT / "setup.cfg").read_text()
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    irg_jax.lode
