"""Rows of a request seen from the event loop: waiting, streaming, time-outs and lost clients."""

import asyncio
import traceback

from starlette.responses import JSONResponse

from irg_jax.serve import replies
from irg_jax.serve.engine import Engine
from irg_jax.serve.work import Event

_ALIVE = 10.0  # seconds between signs of life on a stream


class Gone(Exception):
  """The client has hung up."""


class Late(Exception):
  """A request took longer than its limit."""


class Ticket:
  """The rows of a request in an engine; made in the event loop. See `Engine.submit` for errors."""

  def __init__(self, engine: Engine, works):
    loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
    self.works = works

    def tell(row, event):  # the loop may be closed by now
      if not loop.is_closed():
        loop.call_soon_threadsafe(self._queue.put_nowait, (row, event))

    self._rows = engine.submit(works, tell)

  async def events(self):
    """Yields (number of the row, `work.Event`) until all are done; raises a row's failure."""
    left = len(self.works)
    try:
      while left:
        row, event = await self._queue.get()
        if event.kind == "failed":
          raise event.value
        yield row, event
        left -= event.kind == "done"
    finally:
      self.cancel()

  async def results(self) -> list:
    """The values of the "done" events, in the rows' order."""
    found = {}
    async for row, event in self.events():
      if event.kind == "done":
        found[row] = event.value
    return [found[row] for row in sorted(found)]

  def cancel(self) -> None:
    """Frees the places of all rows."""
    for row in self._rows:
      row.cancel()

  def end(self, error: Exception) -> None:
    """Frees the places of all rows, and `events` raises `error`. In the event loop."""
    self.cancel()
    self._queue.put_nowait((0, Event("failed", error)))


async def watched(receive, ticket: Ticket, seconds: float) -> list:
  """The results of a ticket; `Gone` or `Late` and no rows left if the client or time runs away."""
  results = asyncio.ensure_future(ticket.results())
  gone = asyncio.ensure_future(_hung_up(receive))
  try:
    done, _ = await asyncio.wait((results, gone), timeout=seconds,
                                 return_when=asyncio.FIRST_COMPLETED)
    if results in done:
      return results.result()
    raise Gone if gone in done else Late
  finally:
    ticket.cancel()
    for task in (results, gone):
      task.cancel()


class Stream:
  """A reply of server-sent events, an ASGI application.

  Args:
    ticket: cancelled when the client hangs up.
    events: async iterator of (name of the event or None, JSON object).
    seconds: after so many, the stream ends with an error.
    end: text of the last event, if any.
  """

  status_code = 200

  def __init__(self, ticket: Ticket, events, seconds: float, end: str | None = None):
    self._ticket, self._events, self._seconds, self._end = ticket, events, seconds, end

  async def __call__(self, scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no")]})
    gone = asyncio.ensure_future(_hung_up(receive))
    sending = asyncio.ensure_future(self._send_all(send))
    try:
      await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
    finally:
      self._ticket.cancel()
      for task in (gone, sending):
        task.cancel()

  async def _send_all(self, send):
    put = lambda body, more=True: send(
        {"type": "http.response.body", "body": body, "more_body": more})
    alive = asyncio.ensure_future(_signs_of_life(put))
    try:
      async with asyncio.timeout(self._seconds):
        async for name, body in self._events:
          await put(replies.event(body, name))
      if self._end:
        await put(replies.event(self._end))
    except TimeoutError:
      await put(replies.event(late(self._seconds), "error"))
    except Exception as e:
      traceback.print_exception(e)
      await put(replies.event(failure(), "error"))
    finally:
      alive.cancel()
    await put(b"", False)


async def _signs_of_life(put):
  """Comments, which clients pass over, so that proxies keep the connection."""
  while True:
    await asyncio.sleep(_ALIVE)
    await put(b": alive\n\n")


async def _hung_up(receive):
  while (await receive())["type"] != "http.disconnect":
    pass


def late(seconds: float) -> dict:
  """The error of a request that took too long."""
  return replies.error(f"the request took longer than {seconds:g} seconds", "timeout",
                       code="timeout")


def failure() -> dict:
  """The error of a request that failed here; the server's log says why."""
  return replies.error("the server failed; its log says why", "server_error", code="internal")


async def server_error(_, e) -> JSONResponse:
  """The reply to a request that failed in an unforeseen way."""
  traceback.print_exception(e)
  return JSONResponse(failure(), 500)


async def http_error(_, e) -> JSONResponse:
  """The reply to a wrong path or method."""
  return JSONResponse(replies.error(e.detail, "invalid_request_error", code="not_found"),
                      e.status_code, e.headers)
