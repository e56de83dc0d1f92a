"""Metrics of a run: terminal line, TensorBoard, one JSON line per step; profiler traces."""

import collections
import contextlib
import json
import math
import os
import pathlib
import resource
import sys
import time

import jax
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar, text

from irg_jax import progress, storage
from irg_jax.data.records import MODES
from irg_jax.train.settings import STAGES

FILE = "log.jsonl"
_BAR_WIDTH = 8  # leaves room for the metrics in a terminal of 80 columns
_LISTED_SAMPLES = 40


class Log(contextlib.ExitStack):
  """The log of one stage. A context manager.

  Args:
    folder: of the run; None in all processes but the first: they log nothing.
    stage: name of the stage, in every line and of the folder of TensorBoard files.
    mesh: of the batches that `push` gets.
    start, total: steps already made, and steps of the stage.
    every: steps between two lines in the terminal, and between two points of the curves.
    step_flops: function of a step's metrics to the FLOPs that the step needed.
    peak_flops: FLOP/s of all devices together; 0: unknown, no utilisation is logged.
    sink: further place for the curves: a context manager that yields what `curves` yields.
    more: function without arguments to further metrics of each point of the curves.
    summary: function (values of a step, brief) -> its line in the terminal.
    stream: of the terminal; stderr by default.
  """

  def __init__(self, folder, stage: str, mesh, *, start: int, total: int, every: int, step_flops,
               peak_flops: float, sink=None, more=dict, summary=None, stream=None):
    super().__init__()
    self._summary = summary or _summary
    self._stage, self._total, self._every = stage, total, every
    self._step_flops, self._peak, self._pending = step_flops, peak_flops, None
    self._window, self._last = [], None  # (seconds, tokens, FLOPs) of steps since the last line
    # Only the first process writes, so it needs the samples of all.
    self._replicate = jax.jit(lambda *x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    silent = folder is None
    self._path = os.devnull if silent else os.path.join(folder, FILE)
    self._lines = self.enter_context(_closing(open(
        self._path, "a", encoding="utf-8", buffering=1)))
    self._more, self._sinks = more, [] if silent else [self.enter_context(each) for each in (
        curves(os.path.join(folder, "tensorboard", stage), start), sink) if each]
    self._bar = self.enter_context(progress.terminal_bar(
        self._lines if silent else stream or sys.stderr, _BAR_WIDTH))
    self._task = self._bar.add_task(f"{stage}: the first step compiles", completed=start,
                                    total=total)

  def note(self, text: str) -> None:
    """Prints a line of text in the terminal."""
    self._bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

  def event(self, step: int, **content) -> None:
    """Writes a JSON line; OSError if it cannot be written."""
    with storage.naming(self._path):
      print(json.dumps({"stage": self._stage, "step": step, **content}), file=self._lines)

  def push(self, step: int, metrics: dict, batch) -> None:
    """Logs the step before this one, so that the device never waits. Raises as `flush`.

    Args:
      step: from 1.
      metrics: of `step.train_step`.
    """
    self.flush((step, metrics, self._replicate(batch.sample_mode, batch.sample_index)))

  def flush(self, pending=None) -> None:
    """Logs the last step that was pushed, after waiting for it; keeps `pending` instead.

    Raises:
      ValueError: its loss or gradient is not finite; names the step and its samples.
    """
    before, self._pending = self._pending, pending
    if before is None:
      return
    step, metrics, (modes, records) = jax.device_get(before)
    values = {name: float(x) for name, x in metrics.items()  # no losses of modes without a target
              if not name.startswith("weight/") and metrics.get(f"weight/{name}", 1) > 0}
    samples = [[int(m), int(i)] for m, i in zip(modes.ravel(), records.ravel()) if m >= 0]
    self.step(step, values, samples)
    wrong = [f"{name} is {values[name]}" for name in ("loss", "grad_norm")
             if not math.isfinite(values[name])]
    if wrong:
      raise ValueError(f"step {step}: {' and '.join(wrong)}; samples of the batch: "
                       f"{_listed(samples)}")

  def step(self, step: int, values: dict[str, float], samples: list) -> None:
    """Logs a step; `samples` are [mode, record] numbers, row by row."""
    now, seconds = time.monotonic(), None
    if self._last is not None:  # the time of the first step is that of compilation
      seconds = now - self._last
      tokens = sum(values.get(f"tokens/{kind}", 0.0) for kind in ("text", "latent", "vit"))
      self._window.append((seconds, tokens, self._step_flops(values)))
    self._last, rates = now, {}
    if step % self._every == 0 or step == self._total:
      rates = self._rates()
      self._show(step, values | rates)
    self.event(step, **_rounded(values), seconds=seconds, **_rounded(rates), samples=samples)

  def skipped(self, step: int, by_process: dict) -> None:
    """Logs the number of samples that were too large for a row, by mode and exceeded limit."""
    total = collections.defaultdict(collections.Counter)
    for skipped in by_process.values():
      for mode, limits in skipped.items():
        total[mode].update(limits)
    for mode, limits in total.items():
      self.note(f"{self._stage}: {sum(limits.values())} samples of {mode} were larger than a row: "
                f"{counts(limits)}")
    self.event(step, skipped=total)

  def busy(self, what: str) -> None:
    """Says in a terminal what is done between two steps."""
    self._bar.update(self._task, description=f"{self._stage}: {what}")

  def evaluation(self, step: int, values: dict, line: str, **content) -> None:
    """Logs an evaluation: `values` as of `curves` to all places, `line` in the terminal.

    The time since the last step counts for no step.
    """
    for add in self._sinks:
      add(step, values)
    self.note(line)
    self.event(step, **content)
    self._last = time.monotonic()

  def _rates(self) -> dict:
    rates = memory() | self._more()
    if self._window:
      seconds, tokens, flops = map(sum, zip(*self._window))
      rates |= {"tokens_per_second": tokens / seconds, "seconds_per_step":
                seconds / len(self._window), "tflops_per_second": flops / seconds / 1e12}
      if self._peak:
        rates["flop_utilisation"] = flops / seconds / self._peak
    self._window.clear()
    return rates

  def _show(self, step, values):
    """Adds a point to the curves; updates the bar of a terminal, or prints a line elsewhere."""
    for add in self._sinks:
      add(step, values)
    if self._bar.disable:
      self.note(f"{self._stage}, step {step} of {self._total}: {self._summary(values, False)}")
    self._bar.update(self._task, completed=step,
                     description=f"{self._stage}: {self._summary(values, True)}")


@contextlib.contextmanager
def written(out):
  """Yields (folder for the logs of a run, function that copies what is new in it to `out`).

  It is `out` itself, and there is nothing to copy, but for a run in a bucket, where nothing can be
  appended to: then it is a folder on this machine, copied at the end, too, and gone after that.
  """
  if storage.is_local(out):
    yield out, lambda: None
    return
  known, state = {}, lambda path: (path.stat().st_size, path.stat().st_mtime_ns)
  with storage.scratch_folder(storage.cache_folder("logs")) as folder:
    def copy():
      for path in sorted(folder.rglob("*")):
        if path.is_file() and known.get(path) != (now := state(path)):
          (out / path.relative_to(folder).as_posix()).upload(path)
          known[path] = now

    if jax.process_index() == 0 and (out / FILE).is_file():
      (out / FILE).download(folder / FILE)
      known[folder / FILE] = state(folder / FILE)
    try:
      yield folder, copy
    except BaseException:
      with contextlib.suppress(OSError):  # of the first error
        copy()
      raise
    copy()


@contextlib.contextmanager
def curves(folder, start: int):
  """Yields add(step, values by name), which adds points to curves in a TensorBoard file.

  A value is a number, an image (uint8 [height, width, 3]) or a text.

  tensorboardX's own thread would end at the first error, and be waited for without end.

  Args:
    folder: of the file; made if missing.
    start: steps already made. Earlier points of later steps are hidden: they will be made again.
  """
  def write(step, **content):
    with storage.naming(folder):
      file.write_event(Event(step=step, wall_time=time.time(), **content))

  def add(step, values):
    for name, value in values.items():
      write(step, summary=_summary_of(name, value))
    with storage.naming(folder):
      file.flush()

  with storage.naming(folder):
    os.makedirs(folder, exist_ok=True)
    file = EventsWriter(os.path.join(folder, "events"))
  with _closing(file):
    if start:
      write(start + 1, file_version="brain.Event:2")
      write(start + 1, session_log=SessionLog(status=SessionLog.START))
    yield add


def _summary_of(name, value):
  if isinstance(value, str):
    return text(name, value)
  return image(name, value, dataformats="HWC") if hasattr(value, "shape") else scalar(name, value)


@contextlib.contextmanager
def _closing(file):
  try:
    yield file
  finally:  # what is left to write could not be written before, and that error is raised
    with contextlib.suppress(OSError):
      file.close()


def traced(steps, folder, first: int, count: int, wait):
  """Yields the steps, with a profiler trace of `count` of them from `first` on; 0: no trace.

  Args:
    wait: called before the trace ends, unless the steps end it.
  """
  with contextlib.ExitStack() as trace:
    for step in steps:
      if step == first:
        jax.profiler.start_trace(folder)
        trace.callback(jax.profiler.stop_trace)
      yield step
      if step == first + count - 1:
        wait()
        trace.close()


def forget_after(folder, stage: str, step: int, stages=STAGES) -> None:
  """Truncates the JSON lines after a step of a stage: those steps will be made again.

  `stages` are those of the run, in their order.
  """
  path, end = pathlib.Path(folder) / FILE, 0
  if not path.is_file():
    return
  with open(path, "rb") as lines:
    for line in lines:
      try:
        record = json.loads(line)
        place = stages.index(record["stage"]), record["step"]
      except (ValueError, KeyError, TypeError):
        break  # half a line, of a killed process
      if not line.endswith(b"\n") or place > (stages.index(stage), step):
        break
      end += len(line)
  os.truncate(path, end)


def made(folder, stage: str) -> tuple[int, set[int]]:
  """(last step of a stage, steps after which it was evaluated) in the JSON lines of a run."""
  path, last, evaluated = pathlib.Path(folder) / FILE, 0, set()
  with contextlib.ExitStack() as stack:
    for line in stack.enter_context(open(path, "rb")) if path.is_file() else ():
      with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
        record = json.loads(line)
        if record["stage"] == stage:
          last = max(last, record["step"] if "loss" in record else 0)
          evaluated |= {record["step"]} if "evaluation" in record else set()
  return last, evaluated


def memory() -> dict[str, float]:
  """Metrics of peak memory: of this process and, where known, of the fullest local device."""
  unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, in bytes
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  found = {"memory/host_peak_gib": host / 2**30}
  peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
  if None not in peaks:
    found["memory/device_peak_gib"] = max(peaks) / 2**30
  return found


def rejected(sources: dict) -> dict[str, dict[str, int]]:
  """Number of unusable records of each source, by mode and reason."""
  return {mode: source.metadata["rejected"] for mode, source in sources.items()
          if source.metadata.get("rejected")}


def counts(by_reason: dict) -> str:
  """"reason count, reason count", sorted by reason."""
  return ", ".join(f"{reason} {count}" for reason, count in sorted(by_reason.items()))


def _listed(samples) -> str:
  """"mode record, record; mode ...", for an error message."""
  by_mode = collections.defaultdict(list)
  for mode, record in samples[:_LISTED_SAMPLES]:
    by_mode[MODES[mode]].append(str(record))
  more = len(samples) - _LISTED_SAMPLES
  return "; ".join(f"{mode} {', '.join(records)}" for mode, records in by_mode.items()) + (
      f"; and {more} more, in {FILE}" if more > 0 else "")


def _rounded(values):
  """Nine digits, which tell float32 numbers apart. JSON has no NaN: it becomes a string."""
  return {name: float(f"{value:.9g}") if math.isfinite(value) else str(value)
          for name, value in values.items()}


def _summary(values, brief: bool) -> str:
  parts = [f"loss {values['loss']:.3f}"] if brief else [
      f"loss {values['loss']:.4f}", f"ce {values['ce']:.4f}", f"mse {values['mse']:.4f}",
      f"lr {values['learning_rate']:.3g}"]
  if "tokens_per_second" in values:
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
  if "flop_utilisation" in values:
    share = values["flop_utilisation"]
    parts.append(f"{share:.0%} peak" if brief else f"{share:.1%} of peak")
  return ", ".join(parts)
