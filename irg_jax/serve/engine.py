"""The engine: a thread that owns the devices, and rows of many requests that run side by side.

A row (`Work`) is an image to draw or a question to answer. It waits; it runs one turn, that is one
round or one answer, beside all waiting rows whose compiled programs and settings agree; then it
waits for its next round. So rows join and leave at each round. A turn reads the earlier rounds
again (`done` of `irg.generate`), so nothing stays on the devices between turns. Rows never depend
on each other, see `irg.generate`. On a CPU, where a batch leaves cores idle, several threads do
this, each with its own batch.
"""

import collections
import ctypes
import dataclasses
import functools
import sys
import threading
import time
import traceback

import numpy as np

from irg_jax import messages
from irg_jax.config import update
from irg_jax.generate import irg
from irg_jax.generate.context import LADDER, rung
from irg_jax.generate.generator import Generator
from irg_jax.generate.settings import Settings, expand
from irg_jax.serve.work import Event, Limits, Row, Work

# Seconds that a turn waits for rows that come at the same time: in all, and after the last one.
_GATHER, _PAUSE = 0.1, 0.015
_PATIENCE = 2  # turns for which the oldest row lets larger batches go first


class Full(Exception):
  """The queue is full; the argument is after how many seconds to try again."""


class Closing(Exception):
  """The server finishes what runs and takes nothing new."""


class _Abandoned(Exception):
  """Nobody waits for any row of a turn."""


class Engine:
  """Runs rows on the devices of a `Generator`, in a thread of its own.

  Args:
    generator: the checkpoint.
    settings: of `Limits.settings`; requests change some of them.
    system_prompt: of requests that have none.
    limits: what is accepted.
    metrics: told of turns, see `metrics.Metrics`.
  """

  def __init__(self, generator: Generator, settings: Settings, system_prompt: str, limits: Limits,
               metrics):
    self.generator, self.settings, self.limits = generator, settings, limits
    self.system_prompt, self.metrics = system_prompt, metrics
    self.ready = threading.Event()  # all programs are compiled
    self.failure = None  # of the first programs: nothing can be served
    self._room = irg.Room(thought=settings.think_limit - 1, times=limits.steps)
    self._waiting, self._running = collections.deque(), []
    self._changed, self._closing = threading.Condition(), False
    self._turn_seconds = 1.0  # of a turn lately
    self._sizes = ()  # numbers of rows whose programs are compiled
    self._free = limits.workers  # threads without a turn
    # One thread compiles as well.
    self._threads = [threading.Thread(target=self._run, args=(i == 0,), name="engine", daemon=True)
                     for i in range(limits.workers)]

  def start(self, on_progress=None) -> None:
    """Starts to compile, and then to serve; `on_progress` as of `irg.Job`."""
    self._on_progress = on_progress or (lambda *_: None)
    for thread in self._threads:
      thread.start()

  def close(self) -> None:
    """Waits for all rows that were accepted; takes no more."""
    with self._changed:
      self._closing = True
      self._changed.notify_all()
    for thread in self._threads:
      thread.join()

  @property
  def load(self) -> tuple[int, int]:
    """Rows that (wait, run)."""
    return len(self._waiting), len(self._running)

  @property
  def serves(self) -> bool:
    """Whether rows run already; programs of larger batches may still be compiled."""
    return bool(self._sizes)

  def submit(self, works, tell) -> list[Row]:
    """Accepts all rows of a request, or none.

    Args:
      works: `Work`s.
      tell: called as `tell(number of the row, Event)` in the engine's thread.

    Raises:
      Full: they would not fit the queue.
      Closing: after `close`.
    """
    rows = [Row(work, lambda event, i=i: tell(i, event)) for i, work in enumerate(works)]
    with self._changed:
      if self._closing:
        raise Closing
      held = sum(not row.cancelled for row in (*self._waiting, *self._running))
      if held + len(rows) > self.limits.queue:
        raise Full(max(1, round(self._turn_seconds * (held / self.limits.batch_size + 1))))
      self._waiting.extend(rows)
      self._changed.notify_all()
    return rows

  def _run(self, compiles):
    """Serves what waits; with `compiles`, compiles what requests can reach when nothing does."""
    cases = collections.deque(self._cases() if compiles else ())
    total = len(cases)
    while (rows := self._take(wait=not cases)) is not None:
      if rows:
        self._guarded(rows)
      elif cases:
        self._on_progress("compiling what requests can reach", 0, total - len(cases), total)
        size, case = cases.popleft()
        if not self._warmed(size, case):
          cases = collections.deque(x for x in cases if x[0] < size)
        elif size == 1 or not cases or cases[0][0] > size:  # one row is served at once
          self._sizes = (*(n for n in self._sizes if n < size), size)
      if compiles and not cases and self.failure is None and not self.ready.is_set():
        self._on_progress("compiling what requests can reach", 0, total, total)
        self.ready.set()

  def _take(self, wait):
    """Rows for the next turn; [] if there are none, None once closed. With `wait`, waits."""
    with self._changed:
      while True:
        self._waiting = collections.deque(row for row in self._waiting if not row.cancelled)
        if self._waiting and self._sizes:
          break
        if self._closing and not self._waiting:
          return None
        if not wait:
          return []
        self._changed.wait()
      most, end = self._sizes[-1], time.monotonic() + _GATHER
      while len(self._waiting) < most and time.monotonic() < end:
        count = len(self._waiting)
        self._changed.wait(_PAUSE)
        if len(self._waiting) == count:
          break
      if not self._waiting:  # another thread was first
        return []
      rows = self._chosen(most)
      self._waiting = collections.deque(row for row in self._waiting if row not in rows)
      self._running += rows
      self._free -= 1
      return rows

  def _chosen(self, most):
    """The most rows that can run side by side, but the oldest ones if they were passed over."""
    groups = collections.defaultdict(list)
    for row in self._waiting:
      groups[row.key].append(row)
    first = self._waiting[0]
    rows = max(groups.values(), key=lambda rows: min(len(rows), most))
    if first.passed >= _PATIENCE:
      rows = groups[first.key]
    first.passed = 0 if first in rows else first.passed + 1
    # Free threads share them. A batch that is not half full runs as a smaller one.
    share = -(-len(rows) // max(1, self._free))
    return rows[:min(share, max(n for n in self._sizes if n <= 2 * share))]

  def _guarded(self, rows):
    """A turn; its failure is told to its rows alone."""
    start = time.monotonic()
    try:
      self._turn(rows)
    except _Abandoned:
      pass
    except Exception as e:
      traceback.print_exc()
      for row in rows:
        row.tell(Event("failed", e))
    self._turn_seconds += (time.monotonic() - start - self._turn_seconds) / 4
    with self._changed:
      self._running = [row for row in self._running if row not in rows]
      self._free += 1
      self._changed.notify_all()
    if self.load == (0, 0):
      _trim()

  def _turn(self, rows):
    """Runs one round, or the answers, of rows with one key, and tells their listeners."""
    self.metrics.batch_size.observe(len(rows))
    size = min(n for n in self._sizes if n >= len(rows))
    waiting = self._advance(rows, size, lambda *_: self._heed(rows), self._listener(rows))
    with self._changed:  # in front: those who came first leave first
      self._waiting.extendleft(reversed(waiting))
      self._changed.notify_all()

  def _advance(self, rows, size, heed, listen):
    """`_draw` or `_answer`, by the kind of the rows."""
    run = self._draw if rows[0].work.conversation is None else self._answer
    return run(rows, size, heed, listen)

  def _draw(self, rows, size, heed, listen):
    """Draws the next image of each row; returns the rows that have rounds to come."""
    work, number = rows[0].work, len(rows[0].rounds)
    drawn = self.generator.batch(
        [row.work.prompt for row in rows], [row.work.seed for row in rows],
        dataclasses.replace(work.settings, rounds=number + 1), work.system_prompt, size=size,
        images=[row.work.images for row in rows], done=list(zip(*(row.rounds for row in rows))),
        on_progress=heed, on_text=listen, room=self._room)
    for row, trajectory in zip(rows, drawn):
      last = dataclasses.replace(trajectory.rounds[-1], latents=None)
      row.rounds.append(last)
      row.tell(Event("round", last, number))
      if row.ended:
        row.tell(Event("done", row.rounds))
    self.metrics.phases(max((row.rounds[-1].seconds for row in rows), key=len))
    return [row for row in rows if not row.ended]

  def _answer(self, rows, size, heed, listen):
    start, work = time.monotonic(), rows[0].work
    thoughts = self.generator.answers(
        [row.work.conversation for row in rows], [row.work.seed for row in rows], work.settings,
        work.system_prompt, size=size, on_progress=heed, on_text=listen, room=self._room)
    for row, thought in zip(rows, thoughts):
      row.tell(Event("done", thought))
    self.metrics.phases({"answer": time.monotonic() - start})
    return []

  def _heed(self, rows):
    if all(row.cancelled for row in rows):
      raise _Abandoned

  def _listener(self, rows):
    def listen(number, texts):
      for row, text in zip(rows, texts):
        row.tell(Event("text", text, number))
    return listen

  def _cases(self):
    """(number of rows, function that runs some programs that requests reach), smallest first."""
    for size in self.limits.batch_sizes:
      for width, height in self.limits.sizes:
        for work in self._samples(width, height):
          yield size, functools.partial(self._sample, work, size)
      longest = rung(max(self.settings.max_prompt_tokens + 2, self.settings.think_limit + 1))
      for length in (step for step in LADDER if step <= longest):
        yield size, functools.partial(self._read_thought, length - 2, size)

  def _samples(self, width, height):
    """Works of one update that reach the programs of images of a size."""
    base = dataclasses.replace(
        self.settings, width=width, height=height, steps=2, think_limit=2, think=True,
        rounds=min(2, self.limits.rounds), until_satisfied=False)
    for scales in ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0)):
      guidance = expand(dict(zip(("text_scale", "image_scale"), scales)))
      work = Work(settings=update(base, guidance), system_prompt=self.system_prompt, seed=0,
                  prompt="a")
      yield work
    image = np.zeros((height, width, 3), np.uint8)
    if self.limits.images:
      yield dataclasses.replace(work, images=(image,) * self.limits.images)
      yield dataclasses.replace(work, conversation=(image, "a"))

  def _sample(self, work, size):
    silent = lambda *_: None
    row = Row(work, silent)
    while self._advance([row], size, silent, silent):
      pass

  def _read_thought(self, tokens, size):
    """Reads a thought of a length, and draws."""
    settings = dataclasses.replace(self.settings, rounds=1, steps=2, think=True)
    self.generator.batch(
        ["a"], [0], settings, self.system_prompt, size=size, room=self._room,
        done=[[irg.Round(irg.Thought("", (0,) * tokens), None, None, {})]])

  def _warmed(self, size, case):
    """Whether a case runs; where it does not, smaller batches must do."""
    try:
      case()
      return True
    except Exception as e:
      if not self._sizes:
        with self._changed:
          self.failure, self._closing = e, True
          while self._waiting:
            self._waiting.popleft().tell(Event("failed", e))
          self._changed.notify_all()
      print(f"note: {size} rows side by side do not run here, at most "
            f"{max(self._sizes, default=0)} do: {messages.message(e)}", file=sys.stderr)
      return False


def _trim():
  """Gives freed memory back to the system; glibc would keep what most rows at once have needed."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # none in other C libraries
  if trim:
    trim(0)
