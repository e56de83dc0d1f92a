"""One call to the judge's endpoint: what is sent, and what every kind of failure means.

The key comes from the environment, goes into the client, and nowhere else: whatever text an
endpoint sends back, an error that quotes the request too, passes `hide_key`.
"""

import dataclasses
import datetime
import email.utils
import json
import math
import os
import time
import urllib.parse

KEY = "OPENAI_API_KEY"

_TOP = 20  # alternatives that an endpoint tells the probability of, at most
_LARGEST_BODY = 4 << 20  # bytes; an answer is a few hundred
_AGAIN = (408, 409, 425, 429)  # and every 5xx
_FILTERED = ("content_filter", "content_policy_violation")  # codes that mean this item only
_UNLISTED = 0.005  # probability that the unlisted tokens may have for "no Yes listed" to mean 0


class Fault(Exception):
  """A call without an answer. `again`: trying again may help, after `wait` seconds if it says."""

  def __init__(self, reason: str, detail: str = "", again: bool = True, wait=None):
    detail = hide_key(" ".join(detail.split()))[:300]
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.again, self.wait = reason, again, wait


class Stop(ValueError):
  """No further call makes sense."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """Attributes: the `text`; the `model` that the endpoint names; the `probability` of Yes."""

  text: str
  model: str | None = None
  probability: float | None = None


def hide_key(text: str) -> str:
  """`text` without the key. A key of a few letters, as local endpoints have, is no secret."""
  key = os.environ.get(KEY, "").strip()
  return text.replace(key, f"[{KEY}]") if len(key) >= 8 else text


def check_url(url: str) -> None:
  """Raises ValueError unless `url` is a base address without a secret in it."""
  parts = urllib.parse.urlsplit(url)
  try:
    parts.port
  except ValueError:
    raise ValueError("the judge's address has a port that cannot be: set --judge-url") from None
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError("the judge's address must be like http://localhost:8000/v1: set --judge-url")
  if parts.username or parts.password or parts.query or parts.fragment:
    # The address goes into files, so it is not repeated here either.
    raise ValueError("the judge's address has a user, a password or a query in it; give the bare "
                     f"address, and the key as {KEY} in the environment")


class Endpoint:
  """The client. One call is one HTTP request: it does not retry."""

  def __init__(self, settings):
    try:
      import openai
    except ImportError:
      raise ValueError("asking a judge needs the openai package: pip install 'irg_jax[eval]'"
                       ) from None
    key = os.environ.get(KEY) or "none"  # local endpoints want none
    if not (key.isascii() and key.isprintable() and " " not in key):
      raise ValueError(f"{KEY} has a blank, a line break or a letter in it that no key has")
    self._openai, self._settings = openai, settings
    connect = min(10.0, settings.timeout)
    self._client = openai.OpenAI(
        api_key=key, base_url=settings.url, max_retries=0,
        timeout=openai.Timeout(settings.timeout, connect=connect))

  def close(self) -> None:
    self._client.close()

  def call(self, request, images) -> Reply:
    """Sends a `judge.Request` with its encoded images.

    Raises:
      Fault: no answer came; may pass.
      Stop: none will come, whatever is asked.
    """
    openai = self._openai
    deadline = time.monotonic() + self._settings.timeout
    try:
      with self._client.chat.completions.with_streaming_response.create(
          **self._arguments(request, images)) as response:
        body = _read_body(response, deadline)
    except openai.APITimeoutError:
      raise self._late() from None
    except openai.APIStatusError as e:
      raise _status_fault(e) from None
    except openai.APIConnectionError as e:
      raise Fault("connection", str(e.__cause__ or e)) from None
    except openai.OpenAIError as e:
      raise Fault("client", f"{type(e).__name__}: {e}") from None
    return _parse(body, request.probability)

  def _arguments(self, request, images):
    parts = [{"type": "image_url", "image_url": {"url": p.url}} for p in images]
    parts.append({"type": "text", "text": request.prompt})
    messages = [{"role": "user", "content": parts}]
    if request.system:
      messages.insert(0, {"role": "system", "content": request.system})
    arguments = {"model": self._settings.model, "messages": messages,
                 "temperature": self._settings.temperature, "max_tokens": request.max_tokens}
    if request.probability:
      arguments |= {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
    return arguments

  def _late(self):
    return Fault("timeout", f"no answer within {self._settings.timeout:g} s")


def _read_body(response, deadline):
  """The bytes of an answer. The client's own time-out counts anew with every byte."""
  body = bytearray()
  try:
    for chunk in response.iter_bytes():
      body += chunk
      if time.monotonic() > deadline:
        raise Fault("timeout", "the answer came too slowly")
      if len(body) > _LARGEST_BODY:
        raise Fault("malformed", f"an answer of more than {_LARGEST_BODY} bytes", again=False)
  except Fault:
    raise
  except Exception as e:  # the transport has a library of its own, by version of the client
    slow = "timeout" in type(e).__name__.lower()
    raise Fault("timeout" if slow else "connection", f"broken off within the answer ({e})"
                ) from None
  return bytes(body)


def _status_fault(error):
  """The Fault of an answer with an HTTP status of 400 or more; raises Stop for a hopeless one."""
  status, said = error.status_code, hide_key(" ".join(str(error).split()))[:300]
  if status in (401, 403):
    raise Stop(f"the judge refuses the key ({status}): set {KEY} in the environment to one that "
               f"may use this model. It said: {said}") from None
  if status == 404:
    raise Stop("the judge knows no such model or address (404): check --judge-model and "
               f"--judge-url. It said: {said}") from None
  if error.code == "insufficient_quota":
    raise Stop("the judge's quota is used up; start the same command again when there is more: "
               f"the answers so far are kept. It said: {said}") from None
  if error.code in _FILTERED:
    return Fault("filtered", said, again=False)
  reason = {429: "busy (429)"}.get(status, "server (5xx)" if status >= 500 else f"status {status}")
  return Fault(reason, said, again=status >= 500 or status in _AGAIN,
               wait=retry_after(error.response.headers))


def retry_after(headers) -> float | None:
  """Seconds that the headers ask to wait, as a number or a date; None where they do not."""
  value = headers.get("retry-after")
  if value is None:
    return None
  try:
    seconds = float(value)
  except ValueError:
    try:
      then = email.utils.parsedate_to_datetime(value)
    except ValueError:
      return None
    if then.tzinfo is None:
      then = then.replace(tzinfo=datetime.timezone.utc)
    seconds = (then - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
  return max(0.0, seconds) if math.isfinite(seconds) else None


def _parse(body, probability):
  try:
    answer = json.loads(body)
    choice = answer["choices"][0]
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
      raise TypeError("the content is no text")
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
    start = body[:80].decode(errors="replace")
    raise Fault("malformed", f"{type(e).__name__} in an answer that begins {start!r}") from None
  yes = yes_probability(choice) if probability else None
  if yes is None and not (text and text.strip()):
    raise Fault("empty", f"finish reason {choice.get('finish_reason')}")
  text = hide_key(text or "").encode(errors="replace").decode()  # half a surrogate pair: no UTF-8
  model = answer.get("model")
  return Reply(text, hide_key(model) if isinstance(model, str) else None, yes)


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
