"""Shares of the time of a run: every second in one phase, kept across restarts."""

import json

import jax
import jax.numpy as jnp
import pytest

from irg_jax.train import goodput


class Time:
  """A clock that is set by hand."""

  def __init__(self):
    self.now = 0.0

  def monotonic(self):
    return self.now


@pytest.fixture
def time(monkeypatch):
  time = Time()
  monkeypatch.setattr(goodput, "time", time)
  return time


def spend(time, seconds):
  time.now += seconds


def test_every_second_belongs_to_one_phase_the_innermost(time):
  with goodput.Clock() as clock:
    spend(time, 1)
    with clock("evaluating"):
      spend(time, 2)
      with clock("saving"):
        spend(time, 4)
      spend(time, 8)
    assert clock.shares() == {"time/other": 1 / 15, "time/evaluating": 10 / 15,
                              "time/saving": 4 / 15}


def test_compiling_is_taken_from_the_phase_it_is_in_and_nested_programs_count_once(time):
  event = "/jax/core/compile/jaxpr_trace_duration"
  with goodput.Clock() as clock, clock("evaluating"):
    seconds = {}
    with clock.lap("images", seconds):
      spend(time, 3)
      jax.monitoring.record_event_duration_secs(event, 2.0)  # inside the next one
      spend(time, 2)
      jax.monitoring.record_event_duration_secs(event, 4.5)
      jax.monitoring.record_event_duration_secs("/jax/other", 1.0)
      spend(time, 1)
    assert seconds == {"images": 1.5, "compiling": 4.5}
    assert clock.record()["seconds"]["compiling"] == 4.5
    assert clock.record()["seconds"]["evaluating"] == 1.5


def test_jax_tells_the_clock_of_its_compilations():
  with goodput.Clock() as clock:
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7)).block_until_ready()
  assert clock.seconds["compiling"] > 0
  assert min(clock.seconds.values()) > -1e-3


def test_updates_made_again_after_a_kill_are_counted_apart_and_times_add_up(time, tmp_path):
  with goodput.Clock(tmp_path) as clock:
    clock.resume("stage1", 0, 0)
    for step in range(1, 8):
      with clock.update("stage1", step):
        spend(time, 10)
      if step == 5:
        clock.point()  # the last that is kept
    clock.save = lambda: None  # killed
  with goodput.Clock(tmp_path) as clock:
    spend(time, 5)
    clock.resume("stage1", 3, 7)  # the log knows of step 7
    for step in range(4, 10):
      with clock.update("stage1", step):
        spend(time, 10)
  kept = json.loads((tmp_path / goodput.FILE).read_text())
  assert kept["seconds"]["steps"] == 50 + 20 and kept["seconds"]["redone"] == 40
  assert kept["seconds"]["other"] == 5
  assert (kept["starts"], kept["updates_redone"], kept["reached"]) == (2, 4, {"stage1": 9})
  assert clock.summary().startswith("time: 2 min: steps 60.9%, redone 34.8%, other 4.3%; 2 starts")
  assert "4 updates made again" in clock.summary()


def test_a_second_kill_before_the_first_ones_last_step_forgets_nothing(tmp_path):
  with goodput.Clock(tmp_path) as clock:
    clock.resume("stage1", 10, 18)
    with clock.update("stage1", 11):
      pass
  with goodput.Clock(tmp_path) as clock:
    clock.resume("stage1", 10, 11)  # the log was cut at step 10, and has one step since
    for step in (11, 18, 19):
      with clock.update("stage1", step):
        pass
  assert clock.redone == 3


def test_nothing_is_written_before_a_stage_begins_or_by_others_and_a_damaged_file_is_named(tmp_path):
  for folder in (tmp_path, None):
    with goodput.Clock(folder) as clock:
      clock.point()
  assert not list(tmp_path.iterdir())
  rest = '"starts": 1, "updates_redone": 0, "reached": {}}'
  for content in ('{"seconds": []}', "", "[]", '{"seconds": {"steps": NaN}, ' + rest,
                  '{"seconds": {"steps": -1}, ' + rest, '{"seconds": {}, ' + rest.replace("1", "1e999")):
    (tmp_path / goodput.FILE).write_text(content)
    with pytest.raises(ValueError, match="goodput.json: not the times of a run"):
      goodput.Clock(tmp_path)
