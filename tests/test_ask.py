"""`irg ask`: what is shown while it is decoded is the answer; wrong input is named."""

import sys

import numpy as np
import pytest
from PIL import Image

from engine import SYSTEM_PROMPT, TINY, make_checkpoint
from irg_jax import commands
from irg_jax.generate import answer, generator
from irg_jax.tokenizer import Speller
from serving import Drawer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def photos(tmp_path):
  paths = [tmp_path / "wide.png", tmp_path / "high.png"]
  for path, shape in zip(paths, ((32, 48, 3), (48, 32, 3))):
    Image.fromarray(np.full(shape, 90, np.uint8)).save(path)
  return list(map(str, paths))


class Told(list):
  """A terminal that notes each piece of text."""

  def write(self, text):
    self.append(text)

  def flush(self):
    pass


def test_an_answer_is_shown_piece_by_piece_as_it_is_decoded(checkpoint, photos, monkeypatch):
  drawer, told = Drawer(), Told()
  monkeypatch.setattr(answer, "answer", drawer.answer)
  monkeypatch.setattr(sys, "stdout", told)
  argv = ["ask", " Which is wider? ", "--checkpoint", str(checkpoint), "--seed", "4", "--greedy",
          "--image", photos[0], "--image", photos[1], "--think-limit", "9"]
  assert commands.main(argv) == 0
  want = f"{SYSTEM_PROMPT} 4 9: <48x32> / <32x48> / Which is wider?\n"
  assert "".join(told) == want and len([text for text in told if text]) > 4
  (_, _, settings, _), = drawer.batches
  assert settings.temperature == 0 and settings.steps == TINY.steps


def test_a_piece_holds_back_what_may_still_change():
  whole = "a cafe\u0301 naïve 第一 e\u0301\u0323"
  for step in (1, 2, 5):
    speller, pieces = Speller(), []
    for end in range(0, len(whole), step):
      pieces.append(speller.piece(whole[:end] + "\ufffd"))
    pieces.append(speller.piece(whole, True))
    assert "".join(pieces) == whole and "\ufffd" not in "".join(pieces)
    assert not any(piece.startswith(("\u0301", "\u0323")) for piece in pieces)


@pytest.mark.parametrize("argv, fault", [
    ([" "], "empty"), (["a", "--image", "none.png"], "--image none.png: no such file"),
    (["a", "--seed", "-1"], "--seed -1"), (["a", "--seed", str(2**32)], "--seed 4294967296"),
    (["word " * 300], "tokens"), (["a", "--config.rouns=1"], "rouns"),
    (["a", "--lora", "none"], "--lora none"),
])
def test_a_wrong_question_is_named_before_the_weights_are_read(
    checkpoint, capsys, monkeypatch, argv, fault):
  monkeypatch.setattr(generator, "load", None)
  assert commands.main(["ask", "--checkpoint", str(checkpoint), *argv]) == 2
  shown = capsys.readouterr()
  assert fault in shown.err and "Traceback" not in shown.err and not shown.out


def test_flags_for_images_alone_are_not_taken(checkpoint, capsys):
  for flag in ("--rounds=2", "--size=64", "--no-think", "--fast"):
    with pytest.raises(SystemExit) as left:
      commands.main(["ask", "a", "--checkpoint", str(checkpoint), flag])
    assert left.value.code == 2
