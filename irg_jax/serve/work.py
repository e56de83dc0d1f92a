"""Bounds of a server (`Limits`), and a row on its way: `Work`, `Row`, `Event`."""

import dataclasses
from collections.abc import Callable

import numpy as np

from irg_jax.generate import context
from irg_jax.generate.settings import Settings


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of one server; compiled shapes, memory and waiting follow from these."""

  sizes: tuple[tuple[int, int], ...]  # of images, (width, height)
  batch_size: int = 8  # rows side by side
  workers: int = 1  # batches at once; more than one pays on a CPU alone
  rounds: int = 2
  steps: int = 100  # points of the flow schedule
  images: int = 1  # to edit or ask about, in one request
  n: int = 8  # images of one request
  queue: int = 64  # rows that wait or run
  pixels: int = 2**24  # of an image that is sent
  body: int = 2**25  # bytes of a request
  seconds: float = 600.0  # of a request, waiting included
  read_seconds: float = 30.0  # until a request has arrived

  @property
  def batch_sizes(self) -> tuple[int, ...]:
    """Compiled numbers of rows: powers of four, and the largest."""
    powers = [4**i for i in range(self.batch_size.bit_length()) if 4**i < self.batch_size]
    return (*powers, self.batch_size)

  def settings(self, config, tokenizer, settings: Settings, system_prompt: str) -> Settings:
    """`settings` with a cache in which all that is accepted fits, so that it has one shape.

    `config` is the model's.

    ValueError names a setting that cannot work.
    """
    rounds = self.rounds if settings.think else 1
    most = dataclasses.replace(settings, rounds=rounds, steps=max(self.steps, settings.steps))
    slots, tokens = settings.cache_size or 0, len(tokenizer.encode(system_prompt))
    for width, height in self.sizes:
      sized = dataclasses.replace(most, width=width, height=height)
      sized.validate(config)
      sizes = [settings.vae_transform.size(width, height)[::-1]] * self.images
      plan = lambda found: context.plan_cache(config, sized, tokens, found)[0]
      slots = max(slots, plan(()), plan(sizes))
    return dataclasses.replace(settings, cache_size=slots, rounds=min(settings.rounds, rounds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """One row: a prompt to draw, `settings.rounds` times, or a conversation to answer."""

  settings: Settings
  system_prompt: str
  seed: int
  prompt: str = ""
  images: tuple[np.ndarray, ...] = ()  # to edit, of sizes in `Limits.sizes`
  # texts and images in their order; None: draw
  conversation: tuple[str | np.ndarray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Event:
  """News of a row for its listener.

  kind       value
  "text"     the text of a thought, or an answer, so far
  "round"    an `irg.Round`, complete
  "done"     all rounds, or the answer as an `irg.Thought`; the last event
  "failed"   an exception; the last event
  """

  kind: str
  value: object
  round: int = 0


class Row:
  """A `Work` on its way; `cancel` frees its place."""

  def __init__(self, work: Work, tell: Callable):
    self.work, self.tell, self.rounds, self.cancelled = work, tell, [], False
    self.passed = 0  # turns that went to others while it was the oldest

  def cancel(self):
    self.cancelled = True

  @property
  def ended(self) -> bool:
    """Whether it has all its rounds, or has kept its image."""
    return bool(self.rounds) and (
        self.rounds[-1].kept or len(self.rounds) == self.work.settings.rounds)

  @property
  def key(self):
    """Rows with equal keys can run side by side."""
    work, shape = self.work, lambda part: getattr(part, "shape", "text")
    settings = dataclasses.replace(work.settings, rounds=len(self.rounds) + 1)
    parts = work.images if work.conversation is None else work.conversation
    return (work.conversation is None, settings, work.system_prompt, tuple(map(shape, parts)))
