"""Records of prompts to learn from: of a file, or made by a world. Never one of a test.

A record is a dict with "prompt", and whatever the rewards read beside it; "tag" names its task in
logs.
"""

import hashlib
import json
import re
from collections.abc import Callable

import numpy as np

from irg_jax import evaluate, storage
from irg_jax.generate.settings import check_prompts
from irg_jax.messages import guess

# name -> function of a random generator to a record; worlds register theirs.
WORLDS: dict[str, Callable[[np.random.Generator], dict]] = {}
_TRIES = 1000  # samples of a world for one prompt of the wanted tasks


def register(name: str, sample) -> None:
  """Adds a world that makes records by `sample`, see `WORLDS`."""
  WORLDS[name] = sample


class Prompts:
  """The records of each iteration: `prompts(iteration) -> list of records`.

  Those of a file come in a new random order in each epoch, all of them once.

  Attributes:
    digest: a short text that differs for other records of a file, or another world.

  Raises:
    ValueError: an unknown world; a file or line that cannot be used; a prompt of a test; no prompt
      of the wanted tasks.
  """

  def __init__(self, settings):
    self._settings, self._tests = settings, test_prompts(settings.tests)
    self._sample, self._records = WORLDS.get(settings.prompts), []
    if self._sample is None:
      self._records = [r for r in self._read() if self._wanted(r)]
      if not self._records:
        raise ValueError(f"config field 'prompts': {settings.prompts} holds no prompt with a tag "
                         f"of {', '.join(settings.tasks)}")
    known = [settings.prompts] if self._sample else self._records
    self.digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    self(0)  # what cannot be sampled is told now

  @property
  def known(self) -> list[dict]:
    """All records of a file; those of a world's first iteration."""
    return self._records or self(0)

  def __call__(self, iteration: int) -> list[dict]:
    s = self._settings
    if self._sample is None:
      return [self._of_file(iteration * s.batch + i) for i in range(s.batch)]
    rng = np.random.default_rng([s.seed, iteration])
    return [self._of_world(rng) for _ in range(s.batch)]

  def _of_file(self, number):
    count = len(self._records)
    order = np.random.default_rng([self._settings.seed, number // count]).permutation(count)
    return self._records[order[number % count]]

  def _of_world(self, rng):
    for _ in range(_TRIES):
      record = self._sample(rng)
      if self._wanted(record) and plain(record["prompt"]) not in self._tests:
        return record
    raise ValueError(f"config field 'tasks' is {self._settings.tasks}, but {_TRIES} prompts of "
                     f"{self._settings.prompts} had no such tag")

  def _wanted(self, record):
    return not self._settings.tasks or record.get("tag") in self._settings.tasks

  def _read(self):
    name = self._settings.prompts
    path, records = storage.path(name), []
    if not storage.is_there(path):
      raise ValueError(f"config field 'prompts' is {name!r}, neither a file nor a world"
                       f"{guess(name, WORLDS)}; worlds: {', '.join(WORLDS) or 'none'}")
    for number, line in enumerate(storage.read_text(path).split("\n"), 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
        check_prompts([record["prompt"]])
      except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{path}, line {number}: must be a JSON object with a \"prompt\" ({e})"
                         ) from e
      if source := self._tests.get(plain(record["prompt"])):
        raise ValueError(f"{path}, line {number}: its prompt is one of a test, {source}, and must "
                         "not be learned from")
      records.append(record)
    return records


def plain(prompt: str) -> str:
  """A prompt without what does not tell it from another: case, blanks, the full stop."""
  return re.sub(r"\s+", " ", prompt).strip(" .").casefold()


def test_prompts(files=()) -> dict[str, str]:
  """{plain prompt: where it stands} of the benchmarks in the package, and of files of prompts.

  ValueError names a file that cannot be read.
  """
  found = {plain(item.prompt): f"of {benchmark.title}"
           for benchmark in evaluate.BENCHMARKS.values() if benchmark.packaged
           for item in benchmark.read()}
  for file in files:
    try:
      lines = storage.read_text(storage.path(file)).split("\n")
    except OSError as e:
      raise ValueError(f"config field 'tests': {file} cannot be read ({e.strerror or e})") from e
    found |= {plain(_prompt_in(line)): f"in {file}" for line in lines if line.strip()}
  return found


def _prompt_in(line):
  """The prompt of a JSON line, or the line."""
  try:
    return str(json.loads(line)["prompt"])
  except (ValueError, LookupError, TypeError):
    return line
