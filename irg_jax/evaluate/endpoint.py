"""The judge's endpoint: what is sent, and what is read of a reply.

Every reply, errors included, is read to a bound of its size, compressed or not; redirects are not
followed. The deadline is `judge`'s. The key comes from the environment and goes into the client
alone: all text from the endpoint passes `hide_key`, since an error may quote the request.
"""

import importlib
import json
import math
import os
import zlib

from irg_jax.evaluate.answers import NoAnswer
from irg_jax.reports.pages import short

try:
  import openai
  # The client's transport: httpx, or httpx2, by version.
  httpx = importlib.import_module(next(
      c.__module__.partition(".")[0] for c in openai.DefaultAsyncHttpxClient.__mro__
      if c.__name__ == "AsyncClient"))
except ImportError:  # the extra `eval`
  openai = None

KEY = "OPENAI_API_KEY"
LARGEST_BODY = 4 << 20  # bytes; an answer has a few hundred

_TOP = 20  # alternatives whose probability an endpoint tells, at most
_LARGEST_ERROR = 64 << 10  # bytes that are read of an error
_UNLISTED = 0.005  # probability that the unlisted tokens may have for "no Yes listed" to mean 0
_SUBSTANTIAL = 0.5  # least share of yes and no among the tokens that are no blank
# Finish reasons that are not of an answer: OpenAI's, and what others pass on of their own.
_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "max_length", "model_length")
_WITHHELD = ("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "refusal")
_BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "canceled", "insufficient_system_resource")


class Fault(Exception):
  """A call without an answer. `again`: another try may help, after `wait` seconds if not None."""

  def __init__(self, reason: str, detail: str = "", again: bool = True, wait=None):
    detail = short(hide_key(detail), 300)
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.again, self.wait = reason, again, wait


def hide_key(text: str) -> str:
  """`text` without the key. A key of a few letters, as local endpoints have, is no secret."""
  key = os.environ.get(KEY, "").strip()
  return text.replace(key, f"[{KEY}]") if len(key) >= 8 else text


def client(settings):
  """The client of an endpoint; ValueError for an impossible key."""
  if openai is None:
    raise ValueError("asking a judge needs the openai package: pip install 'irg_jax[eval]'")
  key = os.environ.get(KEY) or "none"  # local endpoints want none
  if not (key.isascii() and key.isprintable() and " " not in key):
    raise ValueError(f"{KEY} has a blank, a line break or a letter in it that no key has")
  # Deadlines and tries are this module's: an answer without words is tried again, too.
  return openai.AsyncOpenAI(
      api_key=key, base_url=settings.url, max_retries=0,
      http_client=openai.DefaultAsyncHttpxClient(
          follow_redirects=False, headers={"accept-encoding": "identity"},
          event_hooks={"response": [_bound]}),
      timeout=openai.Timeout(None, connect=min(10.0, settings.timeout)))


def arguments(settings, question, images) -> dict:
  """The arguments of one question."""
  content = [{"type": "image_url", "image_url": {"url": image.url}} for image in images]
  content.append({"type": "text", "text": question.prompt})
  system = [{"role": "system", "content": question.system}] if question.system else []
  name = "max_completion_tokens" if settings.completion_tokens else "max_tokens"
  sampling = {name: limit(settings, question)}
  if settings.temperature is not None:
    sampling["temperature"] = settings.temperature
  if question.probability:
    sampling |= {"logprobs": True, "top_logprobs": _TOP}
  return {"model": settings.model, "messages": [*system, {"role": "user", "content": content}],
          **sampling}


def limit(settings, question):
  """Tokens that the answer to a question may have."""
  return 1 if question.probability else settings.answer_limit or question.max_tokens


async def _bound(response):
  """Bounds what is read of a reply, as sent and as decompressed; a hook of the client."""
  response.stream = _bounded(response.stream, response.headers.pop("content-encoding", "identity"),
                             _LARGEST_ERROR if response.status_code >= 300 else LARGEST_BODY + 1)


def _bounded(stream, encoding, most):
  """A stream of the first `most` bytes of another, decompressed."""
  class Bounded(httpx.AsyncByteStream):
    """The stream's bytes, decompressed; Fault for an unknown encoding."""

    async def __aiter__(self):
      left, unzip = most, None
      if encoding in ("gzip", "deflate"):
        unzip = zlib.decompressobj(zlib.MAX_WBITS + 32)
      elif encoding != "identity":
        raise Fault("malformed", f"a reply in the encoding {encoding}", again=False)
      async for chunk in stream:
        chunk = unzip.decompress(chunk, left) if unzip else chunk[:left]
        left -= len(chunk)
        yield chunk
        if left <= 0:
          break

    async def aclose(self):
      await stream.aclose()

  return Bounded()


def parse(body, question, asked_model):
  """{"text", "probability", "model", ...} of an answer; Fault for one without words."""
  if len(body) > LARGEST_BODY:
    raise Fault("malformed", f"an answer of more than {LARGEST_BODY} bytes", again=False)
  try:
    answer = json.loads(body)
    choice = answer["choices"][0]
    text = _content(choice["message"])
    finish = str(choice.get("finish_reason") or "").lower()
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
    start = body[:80].decode(errors="replace")
    raise Fault("malformed", f"{type(e).__name__} in an answer that begins {start!r}") from None
  yes = why = None
  if question.probability:
    try:
      yes = yes_probability(choice)
    except NoAnswer as e:
      why = hide_key(str(e))
  if finish in _WITHHELD:
    raise Fault("filtered", "the judge's answer was withheld", again=False)
  if finish in _BROKEN_OFF:
    raise Fault("broken off", f"finish reason {finish}")
  if yes is None and finish not in _CUT_OFF and not text.strip():
    raise Fault("empty", f"finish reason {finish}")
  text = hide_key(text).encode(errors="replace").decode()  # half a surrogate pair: no UTF-8
  model = answer.get("model")
  return {"text": text, "probability": yes, "no_score": why,
          "finish": "length" if finish in _CUT_OFF else finish or None,
          "model": hide_key(model) if model and isinstance(model, str) else asked_model}


def yes_probability(choice: dict) -> float:
  """The probability that the first token is a "yes", in any case and with blanks or not.

  NoAnswer where the endpoint does not tell it, or where the first token is mostly neither yes nor
  no, as of a judge that thinks.
  """
  try:
    listed = choice["logprobs"]["content"][0]["top_logprobs"]
    pairs = [(entry["token"].strip(" \t\n\"'*`.,!▁Ġ").casefold(), math.exp(entry["logprob"]))
             for entry in listed]
  except (LookupError, TypeError, AttributeError, OverflowError):
    pairs = []
  total = math.fsum(p for _, p in pairs)
  if not pairs or not math.isfinite(total) or total > 1.01:
    raise NoAnswer("the endpoint does not tell the probability of Yes")
  share = lambda *words: math.fsum(p for token, p in pairs if token in words)
  if share("yes", "no") < _SUBSTANTIAL * (max(total, 1.0) - share("")):
    raise NoAnswer(f"the judge does not begin with yes or no, but with {listed[0]['token']!r}")
  if not share("yes") and min([1 - total, *(p for _, p in pairs)]) >= _UNLISTED:
    raise NoAnswer("the endpoint does not tell the probability of Yes")
  return min(1.0, share("yes"))


def _content(message):
  """The text of a message: as it is, or of its parts that are no thought; or the refusal."""
  content = message.get("content")
  if isinstance(content, list):
    content = "".join(p if isinstance(p, str) else p["text"] for p in content
                      if isinstance(p, str) or p.get("type") in ("text", "output_text"))
  content = message.get("refusal") if content is None else content
  if not isinstance(content, str | None):
    raise TypeError("the content is no text")
  return content or ""
