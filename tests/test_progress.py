"""Progress bars of a run, as a person sees them."""

import io
import re
import time

import jax

from irg_jax import progress as progress_lib
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
      "thinking, round 1",
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


def test_compiling_is_said_once_a_phase_while_a_program_compiles_and_not_for_an_instant(
    monkeypatch):
  monkeypatch.setattr(progress_lib, "_INSTANT", 0.05)

  def compile(seconds):
    jax.monitoring.record_scalar(progress_lib._COMPILE, 0.0)
    time.sleep(seconds)
    jax.monitoring.record_event_duration_secs(progress_lib._COMPILE, seconds)

  for stream in (io.StringIO(), _Terminal()):
    with Progress(stream) as progress:
      progress("think", 0, 0, 9)
      compile(0)
      time.sleep(0.1)
      assert "compiling" not in stream.getvalue()
      compile(0.3)
      compile(0.3)
    compile(0.1)  # nobody listens any more
    assert "thinking, round 1 (compiling)" in stream.getvalue()
    if not stream.isatty():
      assert stream.getvalue().splitlines() == [
          "thinking, round 1", "thinking, round 1 (compiling)"]


def test_jax_tells_when_it_begins_and_ends_to_compile(monkeypatch):
  monkeypatch.setattr(progress_lib, "_INSTANT", 0.0)
  monkeypatch.setattr(Progress, "_ends", lambda self, event, *_, **__: ends.append(event))
  ends, stream = [], io.StringIO()
  with Progress(stream) as progress:
    progress("think", 0, 0, 9)
    jax.jit(lambda x: x * 2.25)(1.0).block_until_ready()
    time.sleep(0.1)
  assert progress_lib._COMPILE in ends and "(compiling)" in stream.getvalue()
