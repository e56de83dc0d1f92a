"""Questions to a judge: their wording, how a judge is asked, and its answers grouped by prompt.

The key of a question is

  BENCHMARK/ITEM ID/pCELL/rROUND/NAME        such as alphabet/group/000/p2/r1/spelling7

CELL is a number from 0, ROUND one from 1; an image that is no grid is cell 0.
"""

import collections
import dataclasses
import json
import math
import re
import typing
import urllib.parse

_UNLISTED = 0.005  # probability that the unlisted tokens may have for "no Yes listed" to mean 0
_KEY = re.compile(r"([a-z_]+)/(.+)/p(\d+)/r(\d+)/([^/]+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Template:
  """The wording of a question: the `user` turn and the `system` role, with {fields} to fill.

  The criteria, the fields and the form of the answer are the benchmark's; the words are this
  project's. A file with an official wording replaces them: a JSON object with "user" and, if
  there is one, "system".
  """

  user: str
  system: str = ""

  def fill(self, **fields) -> tuple[str, str]:
    """The user's and the system's text. Fields inside filled-in text are left alone."""
    put = lambda match: str(fields.get(match[1], match[0]))
    return tuple(re.sub(r"\{(\w+)\}", put, text) for text in (self.user, self.system))


@dataclasses.dataclass(frozen=True)
class Question:
  """One question to a judge about some images.

  Attributes:
    key: names the question; no other question has it. See `key`.
    images: paths, or `records.Cell`s.
    prompt: the text after the images.
    system: the text of the system role; empty: none.
    max_tokens: of the answer.
    fault: text of an answer -> why it cannot be parsed, or None; None: any text will do.
    probability: ask for one token, and for the probability that it is a "Yes".
  """

  key: str
  images: tuple
  prompt: str
  system: str = ""
  max_tokens: int = 2000
  fault: typing.Callable | None = None
  probability: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
  """The outcome of a question; `error` is None exactly if there is an answer.

  Attributes:
    key: of the question.
    text: the judge's words; with an error too, if there were words that could not be parsed.
    error: "reason: detail"; the reasons are few and constant.
    probability: of "Yes", where it was asked for.
    model: as the endpoint names it.
    cached: taken from the cache, without a call.
  """

  key: str
  text: str | None = None
  error: str | None = None
  probability: float | None = None
  model: str | None = None
  cached: bool = False


@dataclasses.dataclass
class Account:
  """Counts: `questions` = `cached` + `answered` + the sum of `failed`, when a run is over."""

  questions: int = 0
  cached: int = 0
  answered: int = 0
  failed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  calls: int = 0  # sent to the endpoint
  faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, answer: Answer) -> None:
    self.questions += 1
    if answer.error is not None:
      self.failed[answer.error.partition(":")[0]] += 1
    elif answer.cached:
      self.cached += 1
    else:
      self.answered += 1

  def __str__(self):
    by_reason = lambda counts: ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    failed = f" ({by_reason(self.failed)})" if self.failed else ""
    faults = f", of which failed: {by_reason(self.faults)}" if self.faults else ""
    return (f"{self.questions} questions: {self.cached} from the cache, {self.answered} answered, "
            f"{self.failed.total()} without an answer{failed}; {self.calls} calls{faults}")


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """Which judge to ask, and how.

  Attributes:
    url: base address in OpenAI's form, such as http://localhost:8000/v1.
    model: its name there.
    temperature: of the answers.
    concurrency: questions under way at the same time.
    timeout: seconds of one try, from sending to the last byte.
    tries: of one question, while the endpoint is busy, broken or unreachable.
    asks: answers asked for until one can be parsed.
    first_wait: upper bound of the wait before the second try, in seconds; doubles each time, up
      to 60. The waits are random below their bound.
    longest_wait: seconds that the endpoint may ask to wait (Retry-After); more ends the run.
  """

  url: str
  model: str
  temperature: float = 0.0
  concurrency: int = 8
  timeout: float = 120.0
  tries: int = 8
  asks: int = 3
  first_wait: float = 1.0
  longest_wait: float = 600.0

  def __post_init__(self):
    _check_url(self.url)
    if not self.model:
      raise ValueError("the judge's model has no name: set --judge-model")
    if not 0 <= self.temperature <= 2:
      raise ValueError(f"temperature {self.temperature}: must be from 0 to 2")
    for name in ("concurrency", "tries", "asks"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} {getattr(self, name)}: must be 1 or more")
    if not self.timeout > 0:
      raise ValueError(f"timeout {self.timeout}: must be more than 0 seconds")


class OpenJudge(typing.NamedTuple):
  """A judge ready to be asked.

  Attributes:
    ask: iterable of questions -> iterator of answers, one each, in order.
    templates: {name: Template} in place of a benchmark's own.
    record: what scores.json says of the judge.
  """

  ask: typing.Callable
  templates: dict
  record: dict


def key(benchmark: str, item_id: str, cell: int, round: int, name: str) -> str:
  """The key of a question about a cell of an image."""
  return f"{benchmark}/{item_id}/p{cell}/r{round}/{name}"


def split_key(text: str) -> tuple[str, str, int, int, str]:
  """Benchmark, item id, cell, round and name of a question's key."""
  match = _KEY.fullmatch(text)
  if not match:
    raise ValueError(f"{text!r} is not a key of an answer")
  return match[1], match[2], int(match[3]), int(match[4]), match[5]


def answers(items, rounds, ask, questions_of):
  """Asks about every item, round by round.

  Args:
    ask: `OpenJudge.ask`.
    questions_of: (item, round) -> iterable of questions, possibly none.

  Yields:
    (item, round, {(cell, name of the question): Answer}), one for every item and round.
  """
  groups = collections.deque()  # (item, round, number of questions, answers so far)

  def stream():
    for round in rounds:
      for item in items:
        asked = list(questions_of(item, round))
        groups.append((item, round, len(asked), {}))
        yield from asked

  for answer in ask(stream()):
    while not groups[0][2]:
      yield _group(groups)
    found = groups[0][3]
    _, _, cell, _, name = split_key(answer.key)
    found[cell, name] = answer
    if len(found) == groups[0][2]:
      yield _group(groups)
  while groups:
    yield _group(groups)


def failure(answer) -> str | None:
  """Why there is no answer, as "reason: detail"; None where there is one."""
  return "no answer" if answer is None else answer.error or None


def yes_probability(choice: dict) -> float | None:
  """Probability that the first token is a "yes", in any case and with blanks or not.

  None where the endpoint does not tell it: no log-probabilities, or "yes" is not among the
  likeliest and may still be likelier than next to nothing.
  """
  try:
    listed = choice["logprobs"]["content"][0]["top_logprobs"]
    pairs = [(entry["token"], math.exp(entry["logprob"])) for entry in listed]
    yes = [p for token, p in pairs if token.strip().casefold() == "yes"]
  except (LookupError, TypeError, AttributeError, OverflowError):
    return None
  total = math.fsum(p for _, p in pairs)
  if not math.isfinite(total) or total > 1.01:
    return None
  if yes:
    return min(1.0, math.fsum(yes))
  least = min([1 - total, *(p for _, p in pairs)])
  return 0.0 if pairs and least < _UNLISTED else None


def load_template(path, name: str, fields=()) -> Template:
  """Reads the wording in a file.

  Args:
    name: of the template that it replaces, for messages.
    fields: that the user's text must have.

  Raises:
    ValueError: it is no such file, or a field is missing in it.
  """
  try:
    with open(path, encoding="utf-8") as file:
      template = Template(**json.load(file))
  except (OSError, ValueError, TypeError) as e:
    raise ValueError(f"--template {path}: must be a JSON file with an object of \"user\" and, if "
                     f"wanted, \"system\" ({e})") from e
  if not isinstance(template.user, str) or not isinstance(template.system, str):
    raise ValueError(f"--template {path}: \"user\" and \"system\" must be texts")
  for field in fields:
    if f"{{{field}}}" not in template.user:
      raise ValueError(f"--template {path}: the user's text has no {{{field}}}, which {name} needs")
  return template


def chosen_templates(benchmark, flags) -> dict[str, Template]:
  """The templates of `--template [NAME=]FILE` flags, by name.

  Raises:
    ValueError: a file is unfit, or the benchmark has no template of that name.
  """
  chosen = {}
  for flag in flags:
    part, equals, path = flag.partition("=")
    name = f"{benchmark.name}_{part}"
    if not equals or name not in benchmark.templates:  # else the = belongs to the file's name
      name, path = benchmark.name, flag
    if name not in benchmark.templates:
      known = [n.removeprefix(benchmark.name).lstrip("_") for n in benchmark.templates]
      raise ValueError(f"--template {flag}: {benchmark.name} knows {', '.join(known)}")
    chosen[name] = load_template(path, name, benchmark.templates[name][1])
  return chosen


def judge_record(settings, benchmark, templates: dict) -> dict:
  """The judge's entry in scores.json: all that decides an answer."""
  every = {name: built_in for name, (built_in, _) in benchmark.templates.items()} | templates
  return {"url": settings.url, "model": settings.model, "temperature": settings.temperature,
          "asks": settings.asks,
          "templates": {n: {"system": t.system, "user": t.user} for n, t in every.items()}}


def _group(groups):
  item, round, _, found = groups.popleft()
  return item, round, found


def _check_url(url):
  """Raises ValueError unless `url` is a base address without a secret in it."""
  parts = urllib.parse.urlsplit(url)
  try:
    parts.port
  except ValueError:
    raise ValueError("the judge's address has an impossible port: set --judge-url") from None
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError("the judge's address must be like http://localhost:8000/v1: set --judge-url")
  if parts.username or parts.password or parts.query or parts.fragment:
    # The address goes into files, so it is not repeated here either.
    raise ValueError("the judge's address has a user, a password or a query in it; give the bare "
                     "address, and the key as OPENAI_API_KEY in the environment")
