"""What a long run is doing, on stderr: a bar in a terminal, a line a phase elsewhere."""

import contextlib
import sys

# What the engine calls its phases, and what a person reads. `{n}` is the round from 1.
LABELS = {
    "read": "reading weights",
    "prompt": "reading the prompt",
    "think": "thinking, round {n}",
    "draw": "drawing, round {n}",
    "decode": "decoding the image, round {n}",
    "encode": "looking at the image, round {n}",
}
UNITS = {"read": "tensor", "think": "token", "draw": "step"}


class Progress:
  """Shows events as they come; a context manager, so that the bar never outlives the run.

  Call it as the engine does, `progress(kind, round, step, total)`: `kind` is a key of
  `LABELS` (any other text is shown as it is), `round` counts from 0, `step` of `total` steps
  are done (total 0: length unknown). Step 0 announces a phase; the first time it is also when
  its program is compiled, and the display says so.

  Attributes:
    prefix: put before every label, for example "prompt 3 of 10: "; may be changed.
  """

  def __init__(self, stream=None, prefix: str = ""):
    self.prefix = prefix
    self._stream = stream or sys.stderr
    self._bar = terminal_bar(self._stream) if self._stream.isatty() else None
    self._task = None
    self._label, self._step = None, 0
    self._over = set()  # labels of phases that have passed
    self._kinds = set()  # kinds that have been seen

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()

  def __call__(self, kind: str, round: int = 0, step: int = 0, total: int = 0):
    label = self.prefix + LABELS.get(kind, kind).format(n=round + 1)
    if label in self._over:
      return  # devices report without being waited for, so an event may come late
    if label != self._label:
      self._start(label, kind, step)
    self._step = max(self._step, step)
    if self._bar:
      self._bar.update(self._task, completed=self._step, total=total or None)
      if self._step:
        self._bar.update(self._task, description=label)

  def _start(self, label, kind, step):
    compiles = step == 0 and kind not in self._kinds and kind != "read"
    text = label + " (the first time compiles)" if compiles else label
    if self._label is not None:
      self._over.add(self._label)
    self._label, self._step = label, 0
    self._kinds.add(kind)
    if not self._bar:
      print(text, file=self._stream, flush=True)
      return
    if self._task is not None:
      self._bar.remove_task(self._task)
    self._task = self._bar.add_task(text, total=None, unit=UNITS.get(kind, ""))


def terminal_bar(stream, width: int = 40):
  """A `rich` display for a terminal, its bar `width` wide; tasks name a `unit`."""
  from rich import console, progress  # only a terminal pays for the import
  columns = (
      progress.SpinnerColumn(),
      progress.TextColumn("{task.description}"),
      progress.BarColumn(width),
      progress.TextColumn("{task.fields[unit]}"),
      progress.MofNCompleteColumn(separator=" of "),
      progress.TimeElapsedColumn(),
  )
  return progress.Progress(*columns, console=console.Console(file=stream), transient=True)


@contextlib.contextmanager
def counting(label: str, total: int | None):
  """Yields a function that passes an iterable on and shows how far it is; None: of how many."""
  with Progress() as progress:
    def count(items):
      for number, item in enumerate(items, 1):
        progress(label, 0, number, total or 0)
        yield item
    yield count
