"""Progress of a long run on stderr: a bar in a terminal, one line for each phase elsewhere."""

import contextlib
import sys
import threading

from rich import console, progress

# Kinds of phases and their labels; `{n}` is the round from 1.
LABELS = {
    "read": "reading weights",
    "prompt": "reading the prompt",
    "think": "thinking, round {n}",
    "draw": "drawing, round {n}",
    "decode": "decoding the image, round {n}",
    "encode": "looking at the image, round {n}",
}

# JAX tells listeners when it begins to compile a program, or to read it from its cache, and when
# that has ended. What takes this many seconds compiles.
_COMPILE, _INSTANT = "/jax/core/compile/backend_compile_duration", 1.0


class Progress:
  """Context manager that shows events: `progress(kind, round, step, total)`.

  `kind` is a key of `LABELS` or the label itself. `round` counts from 0. `step` of `total` steps
  are done; total 0 is an unknown length. Step 0 announces a phase. While JAX compiles, and not for
  an instant, the display says so. `prefix` ("prompt 3 of 10: ") may be changed.
  """

  def __init__(self, stream=None, prefix: str = ""):
    self.prefix, self._stream = prefix, stream or sys.stderr
    self._bar = terminal_bar(self._stream)
    self._task = self._label = self._said = None
    self._timer = threading.Timer(0, lambda: None)  # of the program that compiles now

  def __enter__(self):
    self._bar.start()
    if jax := sys.modules.get("jax"):  # without it, nothing compiles
      jax.monitoring.register_scalar_listener(self._starts)
      jax.monitoring.register_event_duration_secs_listener(self._ends)
    return self

  def __exit__(self, *_):
    if jax := sys.modules.get("jax"):
      with contextlib.suppress(ValueError, AssertionError):  # loaded meanwhile
        jax.monitoring.unregister_scalar_listener(self._starts)
        jax.monitoring.unregister_event_duration_listener(self._ends)
    self._timer.cancel()
    self._bar.stop()

  def _starts(self, event, *_, **__):
    if event == _COMPILE:
      self._timer.cancel()
      self._timer = threading.Timer(_INSTANT, self._compiles)
      self._timer.daemon = True
      self._timer.start()

  def _ends(self, event, *_, **__):
    if event == _COMPILE:
      self._timer.cancel()
      if self._task is not None:
        self._bar.update(self._task, description=self._label)

  def _compiles(self):
    text = f"{self._label} (compiling)" if self._label else "compiling"
    if self._bar.disable and text != self._said:
      print(text, file=self._stream, flush=True)
    if self._task is not None:
      self._bar.update(self._task, description=text)
    self._said = text

  def __call__(self, kind: str, round: int = 0, step: int = 0, total: int = 0):
    label = self.prefix + LABELS.get(kind, kind).format(n=round + 1)
    if label != self._label:
      if self._bar.disable:
        print(label, file=self._stream, flush=True)
      if self._task is not None:
        self._bar.remove_task(self._task)
      self._task, self._label = self._bar.add_task(label, total=None), label
    self._bar.update(self._task, completed=step, total=total or None)


def terminal_bar(stream, width: int = 40) -> progress.Progress:
  """A `rich` display whose bar is `width` wide; it shows nothing where there is no terminal."""
  columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"),
             progress.BarColumn(width), progress.MofNCompleteColumn(separator=" of "),
             progress.TimeElapsedColumn())
  shown = console.Console(file=stream)
  # FORCE_COLOR makes rich take a pipe for a terminal; a dumb terminal cannot move its cursor.
  return progress.Progress(*columns, console=shown, transient=True,
                           disable=not (stream.isatty() and shown.is_interactive))


@contextlib.contextmanager
def counting(label: str, total: int | None):
  """Yields a function that passes an iterable on and shows how many items have passed."""
  with Progress() as shown:
    def count(items):
      for number, item in enumerate(items, 1):
        shown(label, 0, number, total or 0)
        yield item
    yield count
