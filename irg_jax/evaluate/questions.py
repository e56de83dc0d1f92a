"""Questions to a judge: wording, images, settings, and the answers grouped by prompt.

The key of a question is

  BENCHMARK/ITEM ID/pCELL/rROUND/NAME        such as alphabet/group/000/p2/r1/spelling7

CELL is a number from 0, ROUND one from 1; an image that is no grid is cell 0.
"""

import base64
import collections
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import re
import typing
import urllib.parse

from PIL import Image

from irg_jax import images, storage
from irg_jax.config import check, setting
from irg_jax.evaluate.answers import NoAnswer

BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # from decoding
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class Template(typing.NamedTuple):
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


class Question(typing.NamedTuple):
  """One question to a judge about some images."""

  key: str  # no other question has it; see `key`
  images: tuple  # paths, or `Cell`s
  prompt: str  # the text after the images
  system: str = ""  # the text of the system role; empty: none
  max_tokens: int = 2000  # of the answer
  fault: typing.Callable | None = None  # text -> why it cannot be parsed, or None
  official: typing.Callable | None = None  # the same as the published script parses; None: `fault`
  probability: bool = False  # ask for one token, and for the probability that it is a "Yes"


class Answer(typing.NamedTuple):
  """The outcome of a question; `error` is None exactly if there is an answer."""

  key: str  # of the question
  text: str | None = None  # the judge's words; with an error too, if they could not be parsed
  error: str | None = None  # "reason: detail"; the reasons are few and constant
  probability: float | None = None  # of "Yes", where it was asked for
  model: str | None = None  # as the endpoint names it
  cached: bool = False  # taken from the cache, without a call


@dataclasses.dataclass(frozen=True)
class Form:
  """The form of an answer in words, as two functions: text -> value, or NoAnswer raised."""

  lenient: typing.Callable  # of this project
  official: typing.Callable  # of the published script

  def faults(self) -> dict:
    """The arguments `fault` and `official` of a `Question`."""
    return {"fault": lambda text: self._try(text, False)[1],
            "official": lambda text: self._try(text, True)[1]}

  def take(self, answer, strict: bool = False):
    """(value, reason for none, whether the two functions differ) of an `Answer`."""
    if why := failure(answer):
      return None, why, False
    value, why = self._try(answer.text, strict)
    if why:
      return None, f"unparsable: {why}", False
    return value, None, value != self._try(answer.text, not strict)[0]

  def _try(self, text, strict):
    try:
      return (self.official if strict else self.lenient)(text), None
    except NoAnswer as e:
      return None, str(e)


def failure(answer) -> str | None:
  """Reason for a missing `Answer`, as "reason: detail"; None where there is one."""
  return "no answer" if answer is None else answer.error


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
    if answer.error is None:
      self.cached += answer.cached
      self.answered += not answer.cached
    else:
      self.failed[answer.error.partition(":")[0]] += 1

  def __str__(self):
    by_reason = lambda counts: ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    failed = f" ({by_reason(self.failed)})" if self.failed else ""
    faults = f", of which failed: {by_reason(self.faults)}" if self.faults else ""
    return (f"{self.questions} questions: {self.cached} from the cache, {self.answered} answered, "
            f"{self.failed.total()} without an answer{failed}; {self.calls} calls{faults}")


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """The judge's endpoint and how it is asked. Waits between tries are random below a bound."""

  url: str = setting("", "base address, such as http://localhost:8000/v1")
  model: str = setting("", "its name at the endpoint")
  temperature: float | None = setting(0.0, "of the answers; None: not sent", low=0, high=2)
  concurrency: int = setting(8, "questions at a time", low=1)
  timeout: float = setting(120.0, "seconds of one try", above=0)
  tries: int = setting(8, "of a question that fails, with growing waits or as Retry-After says",
                       low=1)
  asks: int = setting(3, "answers asked for until one can be parsed", low=1)
  answer_limit: int | None = setting(None, "tokens of an answer (default: the official script's)",
                                     low=1)
  completion_tokens: bool = setting(False, "send max_completion_tokens in place of max_tokens")
  strict: bool = setting(False, "read answers exactly as the published scripts do")
  first_wait: float = setting(1.0, "bound of the first wait, in seconds; doubles up to 60")
  longest_wait: float = setting(600.0, "seconds that Retry-After may ask for; more ends the run")

  def __post_init__(self):
    _check_url(self.url)
    if not self.model:
      raise ValueError("the judge's model has no name: set --judge-model")
    check(self)


class OpenJudge(typing.NamedTuple):
  """A judge ready to be asked."""

  ask: typing.Callable  # iterable of questions -> iterator of answers, one each, in order
  templates: dict  # {name: Template} in place of a benchmark's own
  record: dict  # its entry in scores.json


def key(benchmark: str, item_id: str, cell: int, round: int, name: str) -> str:
  """The key of a question about a cell of an image."""
  return f"{benchmark}/{item_id}/p{cell}/r{round}/{name}"


def answers(items, rounds, ask, questions_of):
  """Yields (item, round, {(cell, name of the question): Answer}), every item of every round once.

  `ask` is that of an `OpenJudge`, `questions_of` (item, round) -> iterable of questions.
  """
  groups = collections.deque()  # (item, round, answers so far, number of questions)

  def stream():
    for round, item in itertools.product(rounds, items):
      asked = list(questions_of(item, round))
      groups.append((item, round, {}, len(asked)))
      yield from asked

  for answer in ask(stream()):
    while len(groups[0][2]) == groups[0][3]:
      yield groups.popleft()[:3]
    _, cell, _, name = answer.key.rsplit("/", 3)
    groups[0][2][int(cell[1:]), name] = answer
  for group in groups:
    yield group[:3]


class Unusable(ValueError):
  """An image that is missing or cannot be decoded."""


class Cell(typing.NamedTuple):
  """Cell number `index`, row by row, of the grid in the image at `path`."""

  path: pathlib.PurePath
  columns: int
  rows: int
  index: int

  def crop(self, image: Image.Image) -> Image.Image:
    """The cell's pixels. Surplus ones at the right and the bottom of the grid are in no cell."""
    width, height = image.width // self.columns, image.height // self.rows
    left, top = self.index % self.columns * width, self.index // self.columns * height
    return image.crop((left, top, left + width, top + height))


class Encoded(typing.NamedTuple):
  """An image to send."""

  url: str  # its bytes as a data URL
  digest: str  # SHA-256 of the bytes


def read_image(path) -> bytes:
  """Content of an image's file; Unusable where it is missing or cannot be read.

  OSError where a bucket does not answer: such an image is not to count as missing.
  """
  try:
    return storage.read_file(path)
  except FileNotFoundError:
    raise Unusable(f"{path} is missing") from None
  except OSError as e:
    if not storage.is_local(path):
      raise
    raise Unusable(f"{path} cannot be read ({e})") from e


def encode(image) -> Encoded:
  """The image to send of a path or a Cell; raises Unusable, which names the file.

  A cell becomes a JPEG of Pillow's default quality, as official scripts send it. A file of a type
  that endpoints take is sent unchanged.
  """
  cell = isinstance(image, Cell)
  path = image.path if cell else storage.path(image)
  data = read_image(path)
  try:
    with images.open_image(data) as opened:
      images.load_whole(opened, data)  # a truncated file must not be judged
      kind = opened.format
      if cell or kind not in _TYPES:
        pixels, out, kind = images.to_rgb(opened), io.BytesIO(), "JPEG" if cell else "PNG"
        (image.crop(pixels) if cell else pixels).save(out, format=kind)
        data = out.getvalue()
  except BROKEN as e:
    raise Unusable(f"{path} cannot be read ({e})") from e
  url = f"data:{_TYPES[kind]};base64,{base64.b64encode(data).decode()}"
  return Encoded(url, hashlib.sha256(data).hexdigest())


def cells(path, columns: int = 2, rows: int = 2) -> list[Cell]:
  """The cells of a grid, without the wholly black ones: images that could not be generated.

  Of a grid that cannot be read, all cells: asking about them reports why.
  """
  every = [Cell(storage.path(path), columns, rows, i) for i in range(columns * rows)]
  try:
    with images.open_image(read_image(path)) as opened:
      pixels = images.to_rgb(opened)
      return [cell for cell in every if cell.crop(pixels).getbbox()]
  except (Unusable, *BROKEN):
    return every


def parse_grid(text: str) -> tuple[int, int]:
  """Columns and rows of "2,2", or of "2" as older releases write it."""
  if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)?", text.replace(" ", "")):
    raise ValueError(f"grid {text!r}: write columns,rows such as 2,2")
  numbers = [int(n) for n in text.split(",")]
  return numbers[0], numbers[-1]


def load_template(path, name: str, fields=()) -> Template:
  """Reads the file of a template; ValueError unless the user's text has the `fields`."""
  try:
    template = Template(**json.loads(storage.read_file(path).decode()))
    if not all(isinstance(text, str) for text in template):
      raise TypeError("both must be texts")
  except (OSError, ValueError, TypeError) as e:
    raise ValueError(f"--template {path}: must be a JSON file with an object of \"user\" and, if "
                     f"wanted, \"system\" ({e})") from e
  if missing := [field for field in fields if f"{{{field}}}" not in template.user]:
    raise ValueError(f"--template {path}: the user's text has no {{{missing[0]}}}, which {name} "
                     "needs")
  return template


def chosen_templates(benchmark, flags) -> dict[str, Template]:
  """The templates of `--template [NAME=]FILE` flags, by name; ValueError for an unfit one."""
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
          "asks": settings.asks, "answer_limit": settings.answer_limit,
          "strict_official": settings.strict,
          "templates": {n: {"system": t.system, "user": t.user} for n, t in every.items()}}


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
