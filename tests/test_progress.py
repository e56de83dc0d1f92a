"""Progress bars of a run, as a person sees them."""

import io
import re

from irg_jax.progress import Progress


class _Terminal(io.StringIO):

  def isatty(self):
    return True


def _run(stream, events, prefix=""):
  with Progress(stream, prefix) as progress:
    for event in events:
      progress(*event)
  return stream.getvalue()


def test_a_log_file_gets_one_line_a_phase():
  events = [("think", 0, 0, 23), ("think", 0, 1, 23), ("draw", 0, 1, 49), ("think", 1, 0, 23)]
  assert _run(io.StringIO(), events).splitlines() == [
      "thinking, round 1 (the first time compiles)",
      "drawing, round 1",
      "thinking, round 2",
  ]


def test_a_terminal_sees_step_and_total():
  text = _run(_Terminal(), [("draw", 1, i, 49) for i in range(13)])
  assert "drawing, round 2" in text
  assert "12 of 49" in text


def test_a_total_may_be_unknown():
  text = _run(_Terminal(), [("read", 0, 0, 0), ("draw", 0, 2, 9)])
  assert "reading weights" in text and "2 of 9" in text


def test_the_prefix_tells_which_prompts_run():
  text = _run(io.StringIO(), [("think", 0, 1, 9)], "prompts 3 to 4 of 7: ")
  assert text.startswith("prompts 3 to 4 of 7: thinking, round 1")


def test_an_unknown_kind_is_shown_as_it_is():
  assert _run(io.StringIO(), [("tidying up",)]).startswith("tidying up")


def test_a_pipe_and_a_dumb_terminal_get_lines_without_control_characters(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  assert _run(io.StringIO(), [("draw", 0, 1, 9)]) == "drawing, round 1\n"
  monkeypatch.setenv("TERM", "dumb")
  assert _run(_Terminal(), [("draw", 0, 1, 9)]) == "drawing, round 1\n"


def test_no_color_is_respected(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  coloured = re.compile(r"\x1b\[[\d;]*[34]\d")
  assert coloured.search(_run(_Terminal(), [("draw", 0, 1, 9)]))
  monkeypatch.setenv("NO_COLOR", "1")
  assert not coloured.search(_run(_Terminal(), [("draw", 0, 1, 9)]))
