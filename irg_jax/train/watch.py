"""What watches the steps go by: their numbers, whether they are finite, a profiler trace."""

import collections
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax.data.records import MODES
from irg_jax.train import logs
from irg_jax.train.checkpoints import Checkpoints

_LISTED_SAMPLES = 40


class NonFiniteLoss(ValueError):
  """Training has diverged."""


class Late:
  """Reads the numbers of a step when the next one is under way, so that no device waits.

  Raises:
    NonFiniteLoss: by `push` or `flush`.
  """

  def __init__(self, log: logs.Log, checkpoints: Checkpoints, mesh):
    self._log, self._checkpoints, self._waiting = log, checkpoints, None
    # Every process sees the samples of all, since only the first one writes the log.
    self._gather = jax.jit(lambda *x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def push(self, step: int, metrics: dict, batch) -> None:
    samples = self._gather(batch.sample_mode, batch.sample_index)
    before, self._waiting = self._waiting, (step, metrics, samples)
    self._report(before)

  def flush(self) -> None:
    before, self._waiting = self._waiting, None
    self._report(before)

  def _report(self, waiting):
    if waiting is None:
      return
    step, metrics, (modes, records) = jax.device_get(waiting)
    values = reported(metrics)
    samples = [[int(m), int(i)] for m, i in zip(modes.ravel(), records.ravel()) if m >= 0]
    self._log.step(step, values, samples)
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if wrong:
      raise NonFiniteLoss(
          f"step {step}: {' and '.join(f'{name} is {values[name]}' for name in wrong)}; samples "
          f"of the batch: {listed(samples)}; {self._checkpoints.last_good()}")


def reported(metrics: dict) -> dict[str, float]:
  """What is logged of the metrics of `train.step`: no loss of a mode that had no target."""
  return {name: float(x) for name, x in metrics.items()
          if not name.startswith("weight/") and metrics.get(f"weight/{name}", 1) > 0}


def listed(samples) -> str:
  """Samples as "mode 3, 17; ...", the records of each mode in order."""
  by_mode = collections.defaultdict(list)
  for mode, record in samples[:_LISTED_SAMPLES]:
    by_mode[MODES[mode]].append(str(record))
  more = len(samples) - _LISTED_SAMPLES
  return "; ".join(f"{mode} {', '.join(records)}" for mode, records in by_mode.items()) + (
      f"; and {more} more, in {logs.FILE}" if more > 0 else "")


class Tracer:
  """Takes a profiler trace of `count` steps from step `first` on; 0: none."""

  def __init__(self, folder, first: int, count: int):
    self._folder, self._first, self._count, self._runs = folder, first, count, False

  def before(self, step: int) -> None:
    if step == self._first:
      jax.profiler.start_trace(self._folder)
      self._runs = True

  def after(self, step: int, last: bool, wait) -> None:
    """Ends the trace where it is due, or the steps end; `wait` for what is under way."""
    if self._runs and (last or step == self._first + self._count - 1):
      wait()
      jax.profiler.stop_trace()
      self._runs = False
