"""Rows of `benchmarks/device.py`: timing, failures with their reasons, tables and JSON."""

import importlib.metadata
import platform
import time

import jax

from irg_jax.chips import GIB, peak_tflops
from irg_jax.reports.pages import short, table

PACKAGES = ("irg_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax",
            "optax", "numpy")


class Run:
  """Rows of one run, in order.

  Attributes:
    rows: dicts with "part", "name" and what was measured, or "skipped", the reason.
    parts: seconds and peak memory by part.
  """

  def __init__(self, progress, limit: float, repeat: int, settings: dict):
    self.rows, self.parts = [], {}
    self._progress, self._limit, self._repeat, self._settings = progress, limit, repeat, settings
    self._start, self._part, self._kept = time.perf_counter(), "", {}

  def part(self, name: str, function) -> None:
    """Runs one part; where it fails as a whole, that is a row."""
    self._part, start = name, time.perf_counter()
    try:
      function()
    except Exception as e:  # of any library: the other parts go on
      self.rows.append({"part": name, "name": "all", "skipped": reason(e)})
    self.parts[name] = {"seconds": time.perf_counter() - start, "peak_gib": peak_gib()}

  def attempt(self, name: str, function) -> bool:
    """Adds a row with what `function()` returns, or with the reason why it failed."""
    row = {"part": self._part, "name": name}
    self.rows.append(row)
    self._progress(f"{self._part}: {name}")
    if time.perf_counter() - self._start > self._limit:
      row["skipped"] = f"out of time: {self._limit:.0f} s"
      return False
    try:
      row |= function()
    except Exception as e:  # as above
      row["skipped"] = reason(e)
    return "skipped" not in row

  def once(self, name: str, make):
    """The value that `make()` returned the first time."""
    if name not in self._kept:
      self._progress(f"{self._part}: {name}")
      self._kept[name] = jax.block_until_ready(make())
    return self._kept[name]

  def forget(self) -> None:
    """Frees what `once` keeps."""
    self._kept.clear()

  def timed(self, function, *args, **options) -> dict:
    """See the function `timed`."""
    return timed(function, *args, repeat=self._repeat, **options)

  def passed(self) -> bool:
    """Whether every kernel was compared and is within tolerance."""
    compared = [row for row in self.rows if row["part"] == "oracle"]
    return bool(compared) and all(row.get("within", False) for row in compared)

  def content(self) -> dict:
    """The run as JSON."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "device": {"kind": device.device_kind, "platform": device.platform,
                   "peak_tflops": peak_tflops(device.device_kind) or None,
                   "memory_gib": limit and limit / GIB},
        "versions": {"python": platform.python_version(), **versions(),
                     "runtime": device.client.platform_version},
        "settings": self._settings, "passed": self.passed(), "parts": self.parts,
        "rows": self.rows}

  def text(self) -> str:
    """The tables, for a terminal and for Markdown."""
    content = self.content()
    device, found = content["device"], content["versions"]
    compared = [row for row in self.rows if "errors" in row]
    measured = [row for row in self.rows if "seconds" in row]
    skipped = [row for row in self.rows if "skipped" in row]
    errors = [[row["name"], *(number(row["errors"].get(name), ".1e") for name in (
        "out", "dq", "dk", "dv")), f"{row['tolerance']:.0e}", "yes" if row["within"] else "NO"]
              for row in compared]
    times = [[f"{row['part']}: {row['name']}", *(
        number(row.get(key), form) for key, form in COLUMNS)] for row in measured]
    usage = [[name, f"{part['seconds']:.0f}", number(part["peak_gib"], ".2f")]
             for name, part in self.parts.items()]
    lines = [f"{device['kind']} ({device['platform']}), jax {found['jax']}, "
             f"peak {number(device['peak_tflops'], '.0f') or 'unknown'} TFLOP/s"]
    for head, rows in (
        (("relative error", "out", "dq", "dk", "dv", "at most", "within"), errors),
        (("", "ms", "TFLOP/s", "of peak", "tokens/s", "GiB", "compile s"), times),
        (("part", "seconds", "peak GiB so far"), usage)):
      lines += ["", table(head, rows, numbers=True, padded=True)] if rows else []
    return "\n".join(lines + [""] * bool(skipped) + [
        f"skipped: {row['part']}: {row['name']}: {row['skipped']}" for row in skipped])


# Fields of a measured row and their formats.
COLUMNS = (("milliseconds", ".3f"), ("tflops", ".2f"), ("share", ".1%"), ("rate", ".1f"),
           ("program_gib", ".2f"), ("compile_seconds", ".1f"))


def timed(function, *args, repeat: int = 3, flops: float = 0.0, tokens: int = 0, lower=None,
          again=lambda args, _: args) -> dict:
  """Compiles a function and measures its fastest call.

  Args:
    repeat: timings, of which the best counts; each is a mean over several calls if these are fast.
    flops, tokens: of a call, for its rates.
    lower: function () -> `jax.stages.Lowered`, in place of jitting `function`.
    again: function (arguments, result) -> arguments of the next call.

  Returns:
    dict, the fields of a row.
  """
  start = time.perf_counter()
  compiled = (lower() if lower else jax.jit(function).lower(*args)).compile()
  row = {"compile_seconds": time.perf_counter() - start, "program_gib": program_gib(compiled)}

  def call(args, count):
    start = time.perf_counter()
    for _ in range(count):
      out = compiled(*args)
      args = again(args, out)
    jax.block_until_ready(out)
    return args, (time.perf_counter() - start) / count

  args, _ = call(args, 1)
  args, first = call(args, 1)
  seconds = []
  for _ in range(repeat):
    args, mean = call(args, max(1, min(20, int(0.1 / first))))
    seconds.append(mean)
  row["seconds"] = min(seconds)
  return row | rates(row["seconds"], flops, tokens, peak_tflops(jax.devices()[0].device_kind))


def rates(seconds: float, flops: float, tokens: int, peak: float) -> dict:
  """Rates of a call; what is not known is None."""
  tflops = flops / seconds / 1e12 if flops else None
  return {"milliseconds": 1e3 * seconds, "tflops": tflops,
          "share": tflops / peak if tflops and peak else None,
          "rate": tokens / seconds if tokens else None}


def program_gib(compiled) -> float | None:
  """Memory of a compiled program: arguments, results and temporaries."""
  m = compiled.memory_analysis()
  return m and (m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
                - m.alias_size_in_bytes) / GIB


def peak_gib() -> float | None:
  """The most memory that this process has held on the device; None where it is not counted."""
  peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  return peak and peak / GIB


def reason(error: Exception) -> str:
  """An exception in one line."""
  text = str(error)
  out_of_memory = "RESOURCE_EXHAUSTED" in text and "out of memory (RESOURCE_EXHAUSTED): "
  return short(f"{out_of_memory or ''}{type(error).__name__}: {text}", 300)


def number(value, form: str) -> str:
  return "" if value is None else format(value, form)


def versions() -> dict:
  """Versions of the installed ones of `PACKAGES`."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
