"""The judge's client: any endpoint in OpenAI's form; every answer is paid for once.

  questions -> Judge.ask -> answers, one for each question, in order

An answer is in the cache before it is handed on. The cache knows it by what decides it: model,
temperature, the question's text, the images' bytes. So the same command, started again after a
kill or with another endpoint for the same model, asks only what is still open. One thread runs
all calls as coroutines. One deadline holds for a try as a whole, from connecting to the last byte.
"""

import asyncio
import collections
import contextlib
import email.utils
import functools
import hashlib
import json
import math
import threading
import time
import weakref

import tenacity

from irg_jax.evaluate.base import GIVE_UP_AFTER
from irg_jax.evaluate.endpoint import (
    KEY, Fault, arguments, client, hide_key, limit, openai, parse)
from irg_jax.evaluate.questions import Account, Answer, JudgeSettings, Unusable, encode
from irg_jax.evaluate.records import Cache
from irg_jax.reports.pages import short

CACHE = "judge_cache.sqlite"  # the usual name

_OF_THE_ITEM = ("picture", "filtered")  # failures that do not blame the endpoint
_IRREGULAR = ("unparsable", "cut off")  # answers that cannot be read
_IRREGULAR_RUN = 10  # of them in a row: the judge does not answer in a form that can be read
_PATIENCE = 5.0  # seconds, for answers that are already paid for
_AHEAD = 8  # questions taken for each that is under way, so that a slow one holds up few
_AGAIN = (408, 409, 425, 429)  # and every 5xx
_FILTERED = ("content_filter", "content_policy_violation")  # codes that mean this item only


class Stop(ValueError):
  """A failure after which no further call makes sense."""


class Judge(contextlib.AbstractContextManager):
  """Answers questions from the cache or the endpoint; `account` counts them."""

  def __init__(self, settings: JudgeSettings, cache_path):
    """Opens the cache and the client; ValueError for an impossible key or a cache in use."""
    self.settings, self.account = settings, Account()
    self._client = client(settings)
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
    waiting, keys, self._failures, self._irregular = collections.deque(), set(), 0, 0
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
      self._failures = self._irregular = 0
    elif answer.error.startswith(_IRREGULAR):
      self._irregular += 1
    elif not answer.error.startswith(_OF_THE_ITEM):
      self._failures += 1
    if self._irregular >= _IRREGULAR_RUN:
      raise Stop(f"{self._irregular} answers in a row cannot be read, the last one for "
                 f"'{answer.error}'. The judge said: {short(answer.text or '', 300)!r}. See to its "
                 "thinking, --template and --answer-limit; then start again with another "
                 "--judge-cache, or with more --asks")
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
      if question.probability and "no_score" not in record:
        record = {"asks": 0}  # of a version that took the first token of a thought for a No
      answer = self._read(question, record, cached=True) if record["asks"] else None
      while (answer is None or answer.error) and record["asks"] < self.settings.asks:
        try:
          reply = await self._retrying.copy()(self._call, question, images)
        except Fault as e:
          return Answer(question.key, text=record.get("text"), error=str(e))
        record = {"digest": digest, "key": question.key, **reply,
                  "temperature": self.settings.temperature, "asks": record["asks"] + 1}
        self._cache.add(record)
        answer = self._read(question, record, cached=False)
        if question.probability or answer.error and answer.error.startswith("cut off"):
          break  # asked again, it would be the same
      return answer

  def _read(self, question, record, cached):
    """The Answer to a question from a record of the cache."""
    strict, error = self.settings.strict, None
    find = question.official if strict and question.official else question.fault
    if question.probability:
      error = record["no_score"] and f"unparsable: {record['no_score']}"
    elif record.get("finish") == "length" and not (strict and record["text"]):
      error = f"cut off: at {limit(self.settings, question)} tokens (--answer-limit)"
    elif find and (fault := find(record["text"])):
      error = f"unparsable: {fault}"
    return Answer(question.key, record["text"], error,
                  None if error else record["probability"], record["model"], cached)

  async def _call(self, question, images):
    """One HTTP request; raises Fault, or Stop after which nothing is asked any more."""
    while not self._over.is_set() and (left := self._resume_at - time.monotonic()) > 0:
      await self._sleep(left)
    if self._over.is_set():
      raise self._stop
    self.account.calls += 1
    try:
      return parse(await self._send(question, images), question, self.settings.model)
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
                  create(**arguments(self.settings, question, images)) as response):
        async for chunk in response.iter_bytes():  # bounded by the client
          body += chunk
      return bytes(body)
    except (TimeoutError, openai.APITimeoutError):
      raise Fault("timeout", f"no answer within {self.settings.timeout:g} s") from None
    except openai.APIStatusError as e:
      raise _status_fault(e, self.settings) from None
    except openai.APIConnectionError as e:
      raise Fault("connection", str(e.__cause__ or e)) from None
    except openai.OpenAIError as e:
      raise Fault("client", f"{type(e).__name__}: {e}") from None
    except Fault:
      raise
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


def retry_after(headers) -> float | None:
  """Seconds that the headers ask to wait, as a number or a date; None where they do not."""
  value = headers.get("retry-after", "")
  date = email.utils.parsedate_tz(value)
  try:
    seconds = email.utils.mktime_tz(date) - time.time() if date else float(value)
  except (ValueError, OverflowError):
    return None
  return max(0.0, seconds) if math.isfinite(seconds) else None


def _status_fault(error, settings):
  """The Fault of an HTTP status of 400 or more, or the Stop of a hopeless one."""
  status, said = error.status_code, short(hide_key(str(error)), 300)
  key = (f"the judge refuses the key ({status}): set {KEY} in the environment to one that may use "
         "this model")
  model = "the judge knows no such model or address (404): check --judge-model and --judge-url"
  quota = ("the judge's quota is used up; start the same command again when there is more: the "
           "answers so far are kept")
  moved = short(error.response.headers.get("location", "nowhere").partition("?")[0])
  redirect = (f"the judge's address redirects ({status}) to {moved}, which is not followed: give "
              "the right address in --judge-url")
  why = {401: key, 403: key, 404: model}.get(status) or (redirect if status < 400 else None)
  if status in (400, 422):
    why = next((f"the judge refuses a parameter ({status}): add {flag}" for name, flag, given in (
        ("max_completion_tokens", "--max-completion-tokens", settings.completion_tokens),
        ("temperature", "--no-temperature", settings.temperature is None))
        if name in said and not given), None)
  if why := why or (quota if error.code == "insufficient_quota" else None):
    return Stop(f"{why}. It said: {said}")
  if error.code in _FILTERED:
    return Fault("filtered", said, again=False)
  reason = {429: "busy (429)"}.get(status, "server (5xx)" if status >= 500 else f"status {status}")
  return Fault(reason, said, again=status >= 500 or status in _AGAIN,
               wait=retry_after(error.response.headers))


def _digest(settings, question, images):
  """Name of an answer in the cache, by all that decides it: not the key, nor the address."""
  warmth = settings.temperature if settings.temperature is None else float(settings.temperature)
  tokens = question.max_tokens if question.probability else limit(settings, question)
  asked = [settings.model, warmth, question.system, question.prompt, tokens, question.probability,
           [image.digest for image in images]]
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
