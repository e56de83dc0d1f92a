"""Asks a judge, any endpoint in OpenAI's form, about images; an answer is paid for once.

  requests -> Judge.ask -> answers, one for each request, in the order of the requests

An answer that arrives is in the cache file before it is handed on. The cache knows it by what was
asked, not by who asked: model, temperature, the text of the question, the pictures' bytes. So the
same command, started again after a kill or with another endpoint for the same model, asks only
what is still open.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import queue
import random
import threading
import time

from irg_jax.evaluate import judge_calls
from irg_jax.evaluate import judge_images
from irg_jax.evaluate.judge_types import Account, Answer, Request, Settings
from irg_jax.evaluate.record_log import RecordLog

__all__ = ["Account", "Answer", "CACHE", "Judge", "Request", "Settings"]

CACHE = "judge_cache.jsonl"  # the usual name

# Item after item without any answer means that the endpoint is at fault, not the items;
# but these reasons say nothing about the endpoint.
_GIVE_UP_AFTER = 20
_OF_THE_ITEM = ("picture", "unparsable", "filtered")
_PATIENCE = 5.0  # seconds, for answers that are paid for already
_AHEAD = 8  # requests taken, for each that is under way: so a slow one does not hold up the rest


class Judge:
  """Answers requests from the cache or the endpoint. A context manager.

  Attributes:
    account: what happened so far.
    lost: lines of the cache that a kill had cut short.
  """

  def __init__(self, settings: Settings, cache_path):
    """Opens the cache and the client; sends nothing.

    Raises:
      ValueError: the key cannot be one, the `openai` package is missing, or the cache is in use.
    """
    self.settings = settings
    self.account = Account()
    self._endpoint = judge_calls.Endpoint(settings)
    self._log = RecordLog(cache_path, "digest")
    self.lost = self._log.lost
    self._encode = functools.lru_cache(settings.concurrency + 4)(judge_images.encode)
    self._jobs = queue.SimpleQueue()
    self._state = threading.Condition()  # guards what follows, and the account
    self._under_way = set()  # digests
    self._resume_at = 0.0
    self._over = threading.Event()
    self._stop = judge_calls.Stop("the judge was closed")
    self._threads = [threading.Thread(target=self._work, daemon=True)
                     for _ in range(settings.concurrency)]
    for thread in self._threads:
      thread.start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Stops asking. Answers under way are kept if they come within a few seconds."""
    self._over.set()
    for _ in self._threads:
      self._jobs.put(None)
    patience = time.monotonic() + _PATIENCE
    for thread in self._threads:
      thread.join(max(0.0, patience - time.monotonic()))
    self._endpoint.close()
    self._log.close()

  def ask(self, requests):
    """Yields one Answer a request, in order. Takes requests as it goes, some ahead.

    Raises:
      ValueError: two requests have one key.
      judge_calls.Stop: asking on makes no sense: a wrong key, no such model, quota used up,
        or nothing but failures. What was answered is in the cache.
    """
    seen, waiting, failures = set(), collections.deque(), 0
    ahead = _AHEAD * self.settings.concurrency
    try:
      for future in self._submitted(requests, seen):
        waiting.append(future)
        while waiting and (len(waiting) >= ahead or waiting[0].done()):
          answer = self._take(waiting)
          failures = _failures_in_a_row(failures, answer)
          yield answer
      while waiting:
        answer = self._take(waiting)
        failures = _failures_in_a_row(failures, answer)
        yield answer
    finally:
      for future in waiting:
        future.cancel()

  def _submitted(self, requests, seen):
    for request in requests:
      mark = hashlib.blake2b(request.key.encode(), digest_size=16).digest()
      if mark in seen:
        raise ValueError(f"two requests to the judge have the key {request.key!r}")
      seen.add(mark)
      future = concurrent.futures.Future()
      self._jobs.put((future, request))
      yield future

  def _take(self, waiting):
    answer = waiting.popleft().result()
    self.account.add(answer)
    return answer

  def _work(self):
    while (job := self._jobs.get()) is not None:
      future, request = job
      if future.set_running_or_notify_cancel():
        try:
          if self._over.is_set():
            raise self._stop
          future.set_result(self._answer(request))
        except BaseException as e:  # whoever reads the future is told, whatever it is
          future.set_exception(e)
      del job, future, request  # else an idle thread keeps them

  def _answer(self, request):
    try:
      images = [self._encode(p) for p in request.images]
    except judge_images.Unusable as e:
      return Answer(request.key, error=f"picture: {e}")
    digest = _digest(self.settings, request, images)
    with self._claim(digest):
      record = self._log.get(digest) or {"asks": 0}
      answer = _read(request, record, cached=True) if record["asks"] else None
      while (answer is None or answer.error) and record["asks"] < self.settings.asks:
        try:
          reply = self._call(request, images)
        except judge_calls.Fault as e:
          return Answer(request.key, text=record.get("text"), error=str(e))
        record = {"digest": digest, "key": request.key, "text": reply.text,
                  "probability": reply.probability, "model": reply.model or self.settings.model,
                  "temperature": self.settings.temperature, "asks": record["asks"] + 1}
        self._log.append(record)
        answer = _read(request, record, cached=False)
      return answer

  @contextlib.contextmanager
  def _claim(self, digest):
    """Waits while another thread is at the same question: it will be in the cache then."""
    with self._state:
      self._state.wait_for(lambda: digest not in self._under_way)
      self._under_way.add(digest)
    try:
      yield
    finally:
      with self._state:
        self._under_way.remove(digest)
        self._state.notify_all()

  def _call(self, request, images):
    """One reply, after as many tries as it takes; raises the last Fault, or Stop."""
    for attempt in range(1, self.settings.tries + 1):
      self._wait_for_turn()
      try:
        with self._state:
          self.account.calls += 1
        return self._endpoint.call(request, images)
      except judge_calls.Stop as e:
        self._stop_all(e)
      except judge_calls.Fault as e:
        with self._state:
          self.account.faults[e.reason] += 1
        if not e.again or attempt == self.settings.tries:
          raise
        self._back_off(e, attempt)

  def _back_off(self, fault, attempt):
    if fault.wait is not None:
      if fault.wait > self.settings.longest_wait:
        self._stop_all(judge_calls.Stop(
            f"the judge asks to wait {fault.wait:.0f} s ({fault.reason}); start the same command "
            "again then: the answers so far are kept"))
      with self._state:  # the whole endpoint is busy, so every thread waits
        self._resume_at = max(self._resume_at, time.monotonic() + fault.wait)
    wait = min(60.0, self.settings.first_wait * 2 ** (attempt - 1))
    self._over.wait(wait * random.uniform(0.5, 1.0))  # not all threads at the same time

  def _wait_for_turn(self):
    while not self._over.is_set():
      left = self._resume_at - time.monotonic()
      if left <= 0:
        return
      self._over.wait(left)
    raise self._stop

  def _stop_all(self, stop):
    self._stop = stop
    self._over.set()
    raise stop from None


def _digest(settings, request, images):
  """What decides an answer, and nothing else: not the key, nor the endpoint's address."""
  asked = [settings.model, float(settings.temperature), request.system, request.prompt,
           request.max_tokens, request.probability, [p.digest for p in images]]
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _read(request, record, cached):
  """The Answer that a record of the cache is, for this request."""
  fault = None
  if request.probability:
    if record["probability"] is None:
      fault = "the endpoint does not tell the probability of Yes"
  elif request.fault is not None:
    fault = request.fault(record["text"])
  return Answer(request.key, record["text"], f"unparsable: {fault}" if fault else None,
                None if fault else record["probability"], record["model"], cached)


def _failures_in_a_row(count, answer):
  if answer.error is None:
    return 0
  if answer.error.startswith(_OF_THE_ITEM):
    return count
  if count + 1 >= _GIVE_UP_AFTER:
    raise judge_calls.Stop(f"{count + 1} requests in a row failed, the last one with "
                           f"'{answer.error}'; see to the judge, then start the same command "
                           "again: the answers so far are kept")
  return count + 1
