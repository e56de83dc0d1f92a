"""What a judge is asked, what it answers, and how it is to be asked."""

import collections
import dataclasses

from irg_jax.evaluate import judge_calls


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which judge, and how to ask it.

  Attributes:
    url: base address in OpenAI's form, such as http://localhost:8000/v1.
    model: its name there.
    temperature: of the answers.
    concurrency: requests under way at the same time.
    timeout: seconds that one try may take, from sending to the last byte.
    tries: of one request, when the endpoint is busy, broken or unreachable.
    asks: answers asked for until one can be parsed.
    first_wait: seconds before the second try; doubles each time, up to 60.
    longest_wait: of a wait that the endpoint asks for (Retry-After); more ends the run.
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
    judge_calls.check_url(self.url)
    if not self.model:
      raise ValueError("the judge's model has no name: set --judge-model")
    if not 0 <= self.temperature <= 2:
      raise ValueError(f"temperature {self.temperature}: must be from 0 to 2")
    for name in ("concurrency", "tries", "asks"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} {getattr(self, name)}: must be 1 or more")
    if not self.timeout > 0:
      raise ValueError(f"timeout {self.timeout}: must be more than 0 seconds")


@dataclasses.dataclass(frozen=True)
class Request:
  """One question about some images.

  Attributes:
    key: names the question; no other request has it.
    images: paths, or `judge_images.Cell`s.
    prompt: the text after the images.
    system: the text of the system role; none where empty.
    max_tokens: of the answer.
    fault: tells of a text why it is no answer, or None where it is one.
    probability: ask for one token, and how likely it is a "Yes".
  """

  key: str
  images: tuple
  prompt: str
  system: str = ""
  max_tokens: int = 2000
  fault: object = None
  probability: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
  """What became of a request: `error` is None exactly if there is an answer.

  Attributes:
    key: of the request.
    text: the judge's words; also there, if any came, when they could not be parsed.
    error: "reason: detail"; the reasons are few and constant.
    probability: of "Yes", where it was asked for.
    model: as the endpoint calls what answered.
    cached: nothing was asked for it.
  """

  key: str
  text: str | None = None
  error: str | None = None
  probability: float | None = None
  model: str | None = None
  cached: bool = False


@dataclasses.dataclass
class Account:
  """Counts: `requests` = `cached` + `answered` + the sum of `failed`, when a run is over."""

  requests: int = 0
  cached: int = 0
  answered: int = 0
  failed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  calls: int = 0  # sent to the endpoint
  faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, answer: Answer) -> None:
    self.requests += 1
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
    return (f"{self.requests} questions: {self.cached} from the cache, {self.answered} answered, "
            f"{self.failed.total()} without an answer{failed}; {self.calls} calls{faults}")
