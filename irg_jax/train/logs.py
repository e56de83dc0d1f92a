"""What a run reports: a line in the terminal, TensorBoard files, a JSON line for every step."""

import collections
import json
import math
import os
import pathlib
import resource
import sys
import time

from irg_jax import progress

FILE = "log.jsonl"
_BAR_WIDTH = 8  # the numbers matter more, and a terminal may have 80 columns


class Log:
  """The log of one stage; a context manager.

  Only one process of a run has a folder to write to; the others keep silent.

  Args:
    folder: of the run, or None for a process that only takes part.
    stage: name, for every line and for the folder of the TensorBoard files.
    start, total: steps made and to make.
    every: steps between two lines in the terminal and two points of the curves.
    step_flops: function of a step's values -> FLOPs that the step needed.
    peak_flops: of all devices together; 0: not known, no utilisation is logged.
    stream: of the terminal.
  """

  def __init__(self, folder, stage: str, *, start: int, total: int, every: int, step_flops,
               peak_flops: float, stream=None):
    self._stage, self._total, self._every = stage, total, every
    self._step_flops, self._peak = step_flops, peak_flops
    self._silent, self._board, self._lines = folder is None, None, None
    self._window, self._last = collections.deque(), None  # of the steps since the last line
    if not self._silent:
      self._open(pathlib.Path(folder), start)
      self._line = _Line(stage, start, total, stream or sys.stderr)

  def _open(self, folder, start):
    import tensorboardX  # slow to import
    self._lines = open(folder / FILE, "a", encoding="utf-8", buffering=1)
    # Points of steps that were lost and are made again would stand twice.
    self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard" / self._stage),
                                             purge_step=start + 1 if start else None)

  def __enter__(self):
    if not self._silent:
      self._line.__enter__()
    return self

  def __exit__(self, *_):
    if not self._silent:
      self._line.__exit__()
      self._board.close()
      self._lines.close()

  def note(self, text: str) -> None:
    """A line of text in the terminal."""
    if not self._silent:
      self._line.note(text)

  def step(self, step: int, values: dict[str, float], samples: list) -> None:
    """Records a step, when its numbers are there.

    Args:
      step: from 1.
      values: the metrics of `train.step`.
      samples: [mode, record] numbers of the samples, row by row.
    """
    now, seconds = time.monotonic(), None
    if self._last is not None:  # the first step also compiles, and says nothing about speed
      seconds = now - self._last
      self._window.append((seconds, values["tokens/text"] + values["tokens/latent"]
                           + values["tokens/vit"], self._step_flops(values)))
    self._last = now
    if self._silent:
      return
    due = step % self._every == 0 or step == self._total
    record = {"stage": self._stage, "step": step, **_rounded(values), "seconds": seconds}
    if due:
      rates = self._rates()
      record |= _rounded(rates)
      self._plot(step, values | rates)
      self._line.update(step, values | rates)
    print(json.dumps(record | {"samples": samples}), file=self._lines)

  def event(self, stage: str, step: int, **content) -> None:
    """A JSON line of its own, for what is not a step."""
    if not self._silent:
      print(json.dumps({"stage": stage, "step": step, **content}), file=self._lines)

  def _rates(self) -> dict:
    rates = {f"memory/{name}": gib for name, gib in memory().items()}
    if self._window:
      seconds, tokens, flops = map(sum, zip(*self._window))
      rates |= {"tokens_per_second": tokens / seconds, "seconds_per_step":
                seconds / len(self._window), "tflops_per_second": flops / seconds / 1e12}
      if self._peak:
        rates["flop_utilisation"] = flops / seconds / self._peak
    self._window.clear()
    return rates

  def _plot(self, step, values):
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    self._board.flush()


class _Line:
  """One line that stays in place in a terminal; lines of text elsewhere."""

  def __init__(self, stage, start, total, stream):
    self._stage, self._total, self._stream = stage, total, stream
    self._bar = progress.terminal_bar(stream, _BAR_WIDTH) if stream.isatty() else None
    if self._bar:
      text = f"{stage}: the first step compiles"
      self._task = self._bar.add_task(text, completed=start, total=total, unit="")

  def __enter__(self):
    if self._bar:
      self._bar.start()

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()

  def update(self, step, values):
    if self._bar:
      self._bar.update(self._task, completed=step, description=f"{self._stage}: {_short(values)}")
    else:
      self.note(f"{self._stage}, step {step} of {self._total}: {_summary(values)}")

  def note(self, text):
    if self._bar:
      self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
      print(text, file=self._stream, flush=True)


def forget_after(folder, stage: str, step: int, stages) -> None:
  """Cuts off the JSON lines behind a step of a stage: those steps will be made again.

  Args:
    stages: names of the stages in order.
  """
  path = pathlib.Path(folder) / FILE
  if not path.is_file():
    return
  order, end = list(stages), 0
  with open(path, "rb") as lines:
    for line in lines:
      try:
        record = json.loads(line)
        place = order.index(record["stage"]), record["step"]
      except (ValueError, KeyError, TypeError):
        break  # half a line, from a kill
      if not line.endswith(b"\n") or place > (order.index(stage), step):
        break
      end += len(line)
  os.truncate(path, end)


def memory() -> dict[str, float]:
  """GiB: the peak of the fullest local device where it says, and of this process."""
  import jax
  unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss
  found = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
  peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
  if None not in peaks:
    found["device_peak_gib"] = max(peaks) / 2**30
  return found


def _rounded(values):
  """Nine digits, so that different float32 numbers stay different; JSON knows no NaN."""
  return {name: float(f"{value:.9g}") if math.isfinite(value) else str(value)
          for name, value in values.items()}


def _summary(values) -> str:
  parts = [f"loss {values['loss']:.4f}", f"ce {values['ce']:.4f}", f"mse {values['mse']:.4f}",
           f"lr {values['learning_rate']:.3g}"]
  if "tokens_per_second" in values:
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
  if "flop_utilisation" in values:
    parts.append(f"{values['flop_utilisation']:.1%} of peak")
  return ", ".join(parts)


def _short(values) -> str:
  parts = [f"loss {values['loss']:.3f}"]
  if "tokens_per_second" in values:
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
  if "flop_utilisation" in values:
    parts.append(f"{values['flop_utilisation']:.0%} peak")
  return ", ".join(parts)
