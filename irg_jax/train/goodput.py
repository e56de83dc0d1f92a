"""Time accounting of a run by phase, kept across restarts in OUT/goodput.json.

All time of the main thread belongs to one phase:

  steps        updates that were new                   waiting for data   for the next batch
  redone       updates made again after a kill          saving, restoring  of checkpoints
  compiling    programs, in whichever phase             evaluating         see `watch`
  other        starting, reading, exporting

A preemption costs the updates made again, and starting, restoring and compiling once more.
"""

import contextlib
import math
import threading
import time

import jax

from irg_jax import storage

FILE = "goodput.json"
PHASES = ("steps", "redone", "compiling", "waiting for data", "saving", "restoring", "evaluating",
          "other")
_COMPILING = "/jax/core/compile/"  # tracing, lowering, compiling, or reading from the cache


class Clock:
  """Books the time of a run. A context manager; `with clock(PHASE):` books what is inside.

  Args:
    folder: of the run; None: nothing is kept, as in all processes but the first.
  """

  def __init__(self, folder=None):
    self._path = folder and storage.path(folder) / FILE
    self.seconds, self.starts, self.redone = dict.fromkeys(PHASES, 0.0), 1, 0
    self._reached = {}  # last step made, by stage
    self._phase, self._since, self._compiled = "other", time.monotonic(), []
    if folder is not None and self._path.is_file():
      self._continue()

  def __enter__(self):
    self._thread = threading.get_ident()
    jax.monitoring.register_event_duration_secs_listener(self._compiles)
    return self

  def __exit__(self, error, *_):
    with contextlib.suppress(*[OSError] * (error is not None)):  # that of a bucket, say, is shown
      self.save()
    jax.monitoring.unregister_event_duration_listener(self._compiles)

  @contextlib.contextmanager
  def __call__(self, phase: str):
    before = self._enter(phase)
    try:
      yield
    finally:
      self._enter(before)

  def resume(self, stage: str, step: int, reached: int) -> None:
    """Begins a stage after `step`; updates up to `reached` of it were made before, and lost."""
    self._reached[stage] = max(reached, step, self._reached.get(stage, 0))

  def update(self, stage: str, step: int):
    """`self(phase)` for an update, which is "redone" if it was made before."""
    again = step <= self._reached.get(stage, 0)
    self.redone += again
    self._reached[stage] = max(step, self._reached.get(stage, 0))
    return self("redone" if again else "steps")

  def shares(self) -> dict[str, float]:
    """Shares of the time so far by "time/PHASE", without phases that took none."""
    self._enter(self._phase)
    total = sum(self.seconds.values())
    return {f"time/{name}": spent / total for name, spent in self.seconds.items() if spent > 0}

  @contextlib.contextmanager
  def lap(self, name: str, seconds: dict):
    """Adds the seconds inside to `seconds`, under `name` and under "compiling"."""
    start, before = time.monotonic(), self.seconds["compiling"]
    yield
    compiling = self.seconds["compiling"] - before
    seconds[name] = round(time.monotonic() - start - compiling, 2)
    seconds["compiling"] = round(seconds.get("compiling", 0) + compiling, 2)

  def point(self) -> dict[str, float]:
    """`save`, and `shares`: what the log asks for at each point of its curves."""
    self.save()
    return self.shares()

  def record(self) -> dict:
    """All that is known, as JSON."""
    self._enter(self._phase)
    return {"seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "starts": self.starts, "updates_redone": self.redone, "reached": self._reached}

  def save(self) -> None:
    """Writes the file once a stage has begun; what is not saved is lost with a kill."""
    if self._path is not None and self._reached:
      storage.write_json(self._path, self.record())

  def summary(self) -> str:
    """A line for the end: the shares, and what preemptions cost."""
    shares = sorted(self.shares().items(), key=lambda item: -item[1])
    total = sum(self.seconds.values())
    text = ", ".join(f"{name.removeprefix('time/')} {share:.1%}" for name, share in shares)
    again = f"; {self.starts} starts, {self.redone} updates made again" if self.starts > 1 else ""
    return f"time: {_duration(total)}: {text}{again}"

  def _enter(self, phase):
    now, before = time.monotonic(), self._phase
    self.seconds[before] += now - self._since
    self._phase, self._since = phase, now
    return before

  def _compiles(self, event, duration, **_):
    """Books compilation. An event contains those of the programs inside, which ended earlier."""
    if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
      return
    now = time.monotonic()
    inside = [spent for start, spent in self._compiled if start >= now - duration]
    self._compiled = [x for x in self._compiled if x[0] < now - duration][-64:]
    self._compiled.append((now - duration, duration))
    self._enter(self._phase)
    self.seconds[self._phase] -= duration - sum(inside)
    self.seconds["compiling"] += duration - sum(inside)

  def _continue(self):
    try:
      record = storage.read_json(self._path)
      self.seconds |= {name: float(record["seconds"].get(name, 0)) for name in PHASES}
      if not all(0 <= spent < math.inf for spent in self.seconds.values()):
        raise ValueError("seconds that are no times")
      self.starts, self.redone = int(record["starts"]) + 1, int(record["updates_redone"])
      self._reached = {stage: int(step) for stage, step in record["reached"].items()}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, OSError) as e:
      raise ValueError(f"{self._path}: not the times of a run ({e}); remove it to count "
                       "anew") from e


def _duration(seconds):
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes} min" if hours else (
      f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s")
