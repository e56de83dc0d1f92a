"""A learned stop: a row whose reflection finds nothing to improve keeps its image and is done.

The last `irg.Round` of such a row has that thought and the image of the round before. Inside a
batch a stopped row repeats its last round, so that all rows have as many.
"""

import dataclasses

MOST = 4  # rounds of "auto"


def check(settings, satisfied: str) -> None:
  """Raises ValueError where `settings.until_satisfied` cannot work with a checkpoint.

  `satisfied` is that of the checkpoint's `settings.Defaults`.
  """
  if settings.until_satisfied and not satisfied:
    raise ValueError("config field 'until_satisfied' is true (--rounds auto), but the checkpoint's "
                     "generate.json has no 'satisfied', the words of a reflection that finds "
                     "nothing to improve: give a number of rounds, or set the field to false")


def limit(rounds: str) -> int:
  """The most rounds of "auto" or "auto:N"; ValueError for another text."""
  word, colon, most = rounds.partition(":")
  if word != "auto" or colon and not (most.isdecimal() and int(most)):
    raise ValueError(f"rounds is {rounds!r}, but must be a number, auto (at most {MOST}) or auto:N")
  return int(most) if colon else MOST


def kept(settings, satisfied: str, before, thoughts, seconds) -> list:
  """The last round of each row that stops now or has stopped before; None for the others.

  Args:
    before: the `irg.Round`s before; empty in the first round, in which no row stops.
    thoughts: an `irg.Thought` a row.
    seconds: of the round so far.
  """
  if not (settings.until_satisfied and before):
    return [None] * len(thoughts)
  stop = lambda row, thought: dataclasses.replace(
      row, thought=thought, seconds=dict(seconds), passes=0, kept=True)
  return [row if row.kept else stop(row, thought) if satisfied in thought.text else None
          for row, thought in zip(before, thoughts)]


def own(rounds) -> list:
  """The rounds of a row up to the one that kept its image."""
  return list(rounds)[:next((i for i, row in enumerate(rounds, 1) if row.kept), None)]


def filled(rows, count: int) -> list:
  """Rows of a batch, or rounds of a row, the last one repeated so that there are `count`."""
  return [*rows, *[rows[-1]] * (count - len(rows))]
