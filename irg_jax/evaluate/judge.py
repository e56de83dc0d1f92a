"""The judge's client: any endpoint in OpenAI's form; every answer is paid for once.

  questions -> Judge.ask -> answers, one for each question, in order

An answer is in the cache before it is handed on. The cache knows it by what decides it: model,
temperature, the question's text, the images' bytes. So the same command, started again after a
kill or with another endpoint for the same model, asks only what is still open. One thread runs
all calls as coroutines. The key comes from the environment and goes into the client alone: all
text from the endpoint passes `hide_key`, since an error may quote the request.
"""

import asyncio
import collections
import contextlib
import email.utils
import functools
import hashlib
import json
import math
import os
import threading
import time
import weakref

import tenacity

from irg_jax.evaluate.base import GIVE_UP_AFTER
from irg_jax.evaluate.questions import (
    Account, Answer, JudgeSettings, Unusable, encode, yes_probability)
from irg_jax.evaluate.records import Cache

try:
  import openai
except ImportError:  # the extra `eval`
  openai = None

CACHE = "judge_cache.sqlite"  # the usual name
KEY = "OPENAI_API_KEY"

_OF_THE_ITEM = ("picture", "unparsable", "filtered")  # failures that do not blame the endpoint
_PATIENCE = 5.0  # seconds, for answers that are already paid for
_AHEAD = 8  # questions taken for each that is under way, so that a slow one holds up few
_TOP = 20  # alternatives whose probability an endpoint tells, at most
_AGAIN = (408, 409, 425, 429)  # and every 5xx
_LARGEST_BODY = 4 << 20  # bytes; an answer has a few hundred
_FILTERED = ("content_filter", "content_policy_violation")  # codes that mean this item only


class Fault(Exception):
  """A call without an answer. `again`: another try may help, after `wait` seconds if not None."""

  def __init__(self, reason: str, detail: str = "", again: bool = True, wait=None):
    detail = hide_key(" ".join(detail.split()))[:300]
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.again, self.wait = reason, again, wait


class Stop(ValueError):
  """A failure after which no further call makes sense."""


class Judge(contextlib.AbstractContextManager):
  """Answers questions from the cache or the endpoint; `account` counts them."""

  def __init__(self, settings: JudgeSettings, cache_path):
    """Opens the cache and the client; ValueError for an impossible key or a cache in use."""
    self.settings, self.account = settings, Account()
    self._client = _client(settings)
    self._cache = Cache(cache_path)
    self.lost = self._cache.lost  # lines of an old cache that could not be imported
    self._encode = functools.lru_cache(settings.concurrency + 4)(encode)
    self._turns = asyncio.Semaphore(settings.concurrency)
    self._locks = weakref.WeakValueDictionary()  # by digest, of what is under way
    self._over, self._stop = asyncio.Event(), Stop("the judge was closed")
    self._resume_at = 0.0
    self._retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, Fault) and e.again),
        stop=tenacity.stop_after_attempt(settings.tries),
        wait=tenacity.wait_random_exponential(multiplier=settings.first_wait, max=60),
        sleep=self._sleep, reraise=True)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()

  def __exit__(self, *_):
    """Stops asking. Answers under way are kept if they come within a few seconds."""
    with self._cache:
      asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join()
      self._loop.close()

  def ask(self, questions):
    """Yields one Answer a question, in order. Takes questions as it goes, some ahead.

    Raises:
      ValueError: two questions have one key.
      Stop: for a wrong key, no such model, quota used up, or nothing but failures.
    """
    waiting, keys, self._failures = collections.deque(), set(), 0
    ahead = _AHEAD * self.settings.concurrency
    try:
      for question in questions:
        if question.key in keys:
          raise ValueError(f"two questions to the judge have the key {question.key!r}")
        keys.add(question.key)
        waiting.append(asyncio.run_coroutine_threadsafe(self._in_turn(question), self._loop))
        while waiting and (len(waiting) >= ahead or waiting[0].done()):
          yield self._next(waiting)
      while waiting:
        yield self._next(waiting)
    finally:
      for future in waiting:
        future.cancel()

  def _next(self, waiting):
    answer = waiting.popleft().result()
    self.account.add(answer)
    if answer.error is None:
      self._failures = 0
    elif not answer.error.startswith(_OF_THE_ITEM):
      self._failures += 1
    if self._failures >= GIVE_UP_AFTER:
      raise Stop(f"{self._failures} questions in a row failed, the last one with '{answer.error}'; "
                 "see to the judge, then start the same command again: the answers so far are kept")
    return answer

  async def _in_turn(self, question):
    async with self._turns:
      if self._over.is_set():
        raise self._stop
      task = asyncio.create_task(self._answer(question))
      try:
        return await asyncio.shield(task)  # an answer that is under way is paid for
      except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)  # and keeps its turn
        raise
      except Stop as e:
        self._stop = e
        self._over.set()
        raise

  async def _answer(self, question):
    try:
      images = await asyncio.to_thread(lambda: [self._encode(i) for i in question.images])
    except Unusable as e:
      return Answer(question.key, error=f"picture: {e}")
    digest = _digest(self.settings, question, images)
    async with self._locks.setdefault(digest, asyncio.Lock()):  # who waits finds it in the cache
      record = self._cache.get(digest) or {"asks": 0}
      answer = _read(question, record, cached=True) if record["asks"] else None
      while (answer is None or answer.error) and record["asks"] < self.settings.asks:
        try:
          reply = await self._retrying.copy()(self._call, question, images)
        except Fault as e:
          return Answer(question.key, text=record.get("text"), error=str(e))
        record = {"digest": digest, "key": question.key, **reply,
                  "temperature": self.settings.temperature, "asks": record["asks"] + 1}
        self._cache.add(record)
        answer = _read(question, record, cached=False)
      return answer

  async def _call(self, question, images):
    """One HTTP request; raises Fault, or Stop after which nothing is asked any more."""
    while not self._over.is_set() and (left := self._resume_at - time.monotonic()) > 0:
      await self._sleep(left)
    if self._over.is_set():
      raise self._stop
    self.account.calls += 1
    try:
      return _parse(await self._send(question, images), question, self.settings.model)
    except Fault as e:
      self.account.faults[e.reason] += 1
      if e.wait is not None:  # the whole endpoint is busy, so every question waits
        if e.wait > self.settings.longest_wait:
          raise Stop(f"the judge asks to wait {e.wait:.0f} s ({e.reason}); start the same command "
                     "again then: the answers so far are kept") from None
        self._resume_at = max(self._resume_at, time.monotonic() + e.wait)
      raise

  async def _send(self, question, images):
    """The endpoint's answer as bytes, within the deadline."""
    create, body = self._client.chat.completions.with_streaming_response.create, bytearray()
    try:
      async with (asyncio.timeout(self.settings.timeout),
                  create(**_arguments(self.settings, question, images)) as response):
        async for chunk in response.iter_bytes():
          body += chunk
          if len(body) > _LARGEST_BODY:
            break
      return bytes(body)
    except (TimeoutError, openai.APITimeoutError):
      raise Fault("timeout", f"no answer within {self.settings.timeout:g} s") from None
    except openai.APIStatusError as e:
      raise _status_fault(e) from None
    except openai.APIConnectionError as e:
      raise Fault("connection", str(e.__cause__ or e)) from None
    except openai.OpenAIError as e:
      raise Fault("client", f"{type(e).__name__}: {e}") from None
    except Exception as e:  # of the client's transport, within the answer
      raise Fault("connection", str(e)) from None

  async def _sleep(self, seconds):
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(self._over.wait(), seconds)

  async def _close(self):
    self._over.set()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
      _, late = await asyncio.wait(tasks, timeout=_PATIENCE)
      for task in late:
        task.cancel()
      await asyncio.gather(*late, return_exceptions=True)
    await self._client.close()


def hide_key(text: str) -> str:
  """`text` without the key. A key of a few letters, as local endpoints have, is no secret."""
  key = os.environ.get(KEY, "").strip()
  return text.replace(key, f"[{KEY}]") if len(key) >= 8 else text


def retry_after(headers) -> float | None:
  """Seconds that the headers ask to wait, as a number or a date; None where they do not."""
  value = headers.get("retry-after", "")
  date = email.utils.parsedate_tz(value)
  try:
    seconds = email.utils.mktime_tz(date) - time.time() if date else float(value)
  except (ValueError, OverflowError):
    return None
  return max(0.0, seconds) if math.isfinite(seconds) else None


def _client(settings):
  if openai is None:
    raise ValueError("asking a judge needs the openai package: pip install 'irg_jax[eval]'")
  key = os.environ.get(KEY) or "none"  # local endpoints want none
  if not (key.isascii() and key.isprintable() and " " not in key):
    raise ValueError(f"{KEY} has a blank, a line break or a letter in it that no key has")
  # Deadlines and tries are this module's: an answer without words is tried again, too.
  return openai.AsyncOpenAI(
      api_key=key, base_url=settings.url, max_retries=0,
      timeout=openai.Timeout(None, connect=min(10.0, settings.timeout)))


def _arguments(settings, question, images):
  content = [{"type": "image_url", "image_url": {"url": image.url}} for image in images]
  content.append({"type": "text", "text": question.prompt})
  system = [{"role": "system", "content": question.system}] if question.system else []
  length = ({"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP} if question.probability
            else {"max_tokens": question.max_tokens})
  return {"model": settings.model, "messages": [*system, {"role": "user", "content": content}],
          "temperature": settings.temperature, **length}


def _status_fault(error):
  """The Fault of an HTTP status of 400 or more, or the Stop of a hopeless one."""
  status, said = error.status_code, hide_key(" ".join(str(error).split()))[:300]
  key = (f"the judge refuses the key ({status}): set {KEY} in the environment to one that may use "
         "this model")
  model = "the judge knows no such model or address (404): check --judge-model and --judge-url"
  quota = ("the judge's quota is used up; start the same command again when there is more: the "
           "answers so far are kept")
  why = {401: key, 403: key, 404: model}.get(status)
  if why := why or (quota if error.code == "insufficient_quota" else None):
    return Stop(f"{why}. It said: {said}")
  if error.code in _FILTERED:
    return Fault("filtered", said, again=False)
  reason = {429: "busy (429)"}.get(status, "server (5xx)" if status >= 500 else f"status {status}")
  return Fault(reason, said, again=status >= 500 or status in _AGAIN,
               wait=retry_after(error.response.headers))


def _parse(body, question, asked_model):
  """{"text", "probability", "model"} of an answer; raises Fault where there are no words in it."""
  if len(body) > _LARGEST_BODY:
    raise Fault("malformed", f"an answer of more than {_LARGEST_BODY} bytes", again=False)
  try:
    answer = json.loads(body)
    choice = answer["choices"][0]
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
      raise TypeError("the content is no text")
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
    start = body[:80].decode(errors="replace")
    raise Fault("malformed", f"{type(e).__name__} in an answer that begins {start!r}") from None
  yes = yes_probability(choice) if question.probability else None
  if yes is None and not (text and text.strip()):
    raise Fault("empty", f"finish reason {choice.get('finish_reason')}")
  text = hide_key(text or "").encode(errors="replace").decode()  # half a surrogate pair: no UTF-8
  model = answer.get("model")
  return {"text": text, "probability": yes,
          "model": hide_key(model) if model and isinstance(model, str) else asked_model}


def _digest(settings, question, images):
  """Name of an answer in the cache, by all that decides it: not the key, nor the address."""
  asked = [settings.model, float(settings.temperature), question.system, question.prompt,
           question.max_tokens, question.probability, [image.digest for image in images]]
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _read(question, record, cached):
  """The Answer to a question from a record of the cache."""
  fault = None
  if question.probability:
    if record["probability"] is None:
      fault = "the endpoint does not tell the probability of Yes"
  elif question.fault is not None:
    fault = question.fault(record["text"])
  return Answer(question.key, record["text"], f"unparsable: {fault}" if fault else None,
                None if fault else record["probability"], record["model"], cached)
