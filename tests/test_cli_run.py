"""`irg init` and `irg generate` for real, on a tiny model with random weights."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from test_compiled import kept, programs

import irg_jax
from irg_jax import commands, config
from irg_jax.generate import generator
from irg_jax.generate.settings import Settings

pytestmark = pytest.mark.usefixtures("on_one_device")
ROOT = pathlib.Path(__file__).resolve().parents[1]
# Short: the point is that everything is connected, not what comes out.
SHORT = ["--config", str(ROOT / "configs" / "generate_tiny.py"), "--steps", "3", "--size", "48x32",
         "--think-limit", "5"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights") / "tiny"
  config = str(ROOT / "configs" / "tiny.py")
  assert commands.main(["init", "--config", config, "--out", str(folder),
                   "--config.model.llm.num_layers=1"]) == 0
  return str(folder)


def _generate(checkpoint, out, *argv):
  return commands.main(["generate", "--checkpoint", checkpoint, "--out", str(out), *SHORT, *argv])


def test_two_rounds_become_images_and_a_trace_and_their_programs_are_compiled_once(
    checkpoint, programs, tmp_path, capsys):
  jax.clear_caches()  # of programs that other tests compiled before there was a folder for them
  assert _generate(checkpoint, tmp_path / "out", "a fox", "--seed", "3") == 0
  captured = capsys.readouterr()
  assert "trace.html" in captured.out
  assert "drawing, round 2" in captured.err
  written = {p.name for p in (tmp_path / "out").iterdir()}
  assert written == {"round1.png", "round2.png", "trace.json", "trace.html"}
  record = json.loads((tmp_path / "out" / "trace.json").read_text())
  assert (record["prompt"], record["seed"], len(record["rounds"])) == ("a fox", 3, 2)
  assert (record["settings"]["steps"], record["settings"]["dtype"]) == (3, "float32")
  assert Image.open(tmp_path / "out" / "round2.png").size == (48, 32)
  found, events = kept(programs), []
  for step in ("append_text", "append_image", "think", "denoise", "decode_pixels",
               "encode_pixels"):
    assert any(name.startswith(f"jit_{step}-") for name in found), step
  listen = lambda event, **_: events.append(event.rpartition("/")[2])
  jax.clear_caches()
  jax.monitoring.register_event_listener(listen)
  assert _generate(checkpoint, tmp_path / "again", "a fox", "--seed", "3") == 0
  jax.monitoring.unregister_event_listener(listen)
  assert events.count("cache_hits") > 8 and "cache_misses" not in events and kept(programs) == found
  assert "compiling" not in capsys.readouterr().err
  for name in ("round1.png", "round2.png"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_python_draws_what_the_command_line_draws(checkpoint, tmp_path):
  assert _generate(checkpoint, tmp_path / "out", "a fox", "--seed", "3") == 0
  settings = config.read(Settings(), ROOT / "configs" / "generate_tiny.py", [])
  irg_jax.load(checkpoint).generate(
      "a fox", seed=3, settings=settings, steps=3, size=(48, 32), think_limit=5,
  ).save(tmp_path / "python")
  drawn, again = ((json.loads((tmp_path / name / "trace.json").read_text()),
                   *(tmp_path.joinpath(name, f"round{n}.png").read_bytes() for n in (1, 2)))
                  for name in ("out", "python"))
  for entry in drawn[0]["rounds"] + again[0]["rounds"]:
    entry.pop("seconds")
  assert drawn == again


def test_prompts_in_batches_get_what_they_get_alone(checkpoint, tmp_path, capsys):
  prompts, flags = ["a fox", "two big dogs", "rain"], ["--rounds", "1", "--no-think"]
  assert _generate(checkpoint, tmp_path / "all", *prompts, *flags, "--batch-size", "2",
                   "--seed", "8") == 0
  assert "index.html" in capsys.readouterr().out
  assert (tmp_path / "all" / "index.html").is_file()
  assert _generate(checkpoint, tmp_path / "one", "rain", *flags, "--seed", "10") == 0
  images = [np.asarray(Image.open(folder / "round1.png"), int)
              for folder in (tmp_path / "all" / "003", tmp_path / "one")]
  assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("argv, message", [
    (["--rounds", "0"], "'rounds' is 0"),
    (["--size", "50"], "50 is not a positive multiple of 16"),
    (["--size", "256"], "256 is more than the 128 pixels"),
    (["--steps", "1"], "'steps' is 1"),
    (["--text-scale", "nan"], "'first.text_scale' is nan, but must be finite"),
    (["--temperature", "-1"], "temperature"),
    (["--config.max_prompt_tokens=3"], "prompt 1 has 5 tokens"),
    (["--mesh", "data=3"], "mesh {'data': 3} needs 3 devices"),
    (["--config.cache_size=100"], "cache_size 100 is too small"),
    (["--config.vae_transform.max_size=512", "--config.vae_transform.min_size=512"],
     "vae_transform reads images back at"),
])
def test_a_request_that_cannot_work_writes_nothing(checkpoint, tmp_path, capsys, argv, message):
  assert _generate(checkpoint, tmp_path / "out", "a fox", *argv) == 2
  printed = capsys.readouterr().err
  assert message in printed and "reading weights" not in printed
  assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named(checkpoint, tmp_path, capsys):
  path = tmp_path / "photo.png"
  path.write_bytes(b"not a picture")
  assert _generate(checkpoint, tmp_path / "out", "a fox", "--image", str(path)) == 2
  assert str(path) in capsys.readouterr().err


def test_an_output_folder_of_someone_else_is_left_alone(checkpoint, tmp_path, capsys):
  (tmp_path / "thesis.txt").write_text("years of work")
  assert _generate(checkpoint, tmp_path, "a fox") == 2
  assert "thesis.txt" in capsys.readouterr().err


def test_batches_cover_every_prompt_once():
  assert [list(b) for b in generator.batches(5, 2)] == [[0, 1], [2, 3], [4]]
  assert [list(b) for b in generator.batches(2, 8)] == [[0, 1]]
