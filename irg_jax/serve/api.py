"""The HTTP API: OpenAI's image and chat endpoints on an `engine.Engine` (docs/serve.md).

A request is read within bounds, becomes rows of the engine, and waits for their events. A client
that hangs up frees its rows.
"""

import asyncio
import collections
import contextlib
import hmac
import json
import secrets
import time

from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from irg_jax.serve import fields, replies
from irg_jax.serve.engine import Closing, Engine, Full
from irg_jax.serve.fields import ChatFields, ImageFields, Refused
from irg_jax.serve.tickets import (
    Gone, Late, Stream, Ticket, http_error, late, server_error, watched)
from irg_jax.tokenizer import Speller

_FIELDS = 64  # of a form


class Server:
  """The endpoints of one engine.

  Args:
    engine: draws and answers.
    name: of the model in replies and requests.
    key: clients must send it as a bearer token; None: none is asked for.
  """

  def __init__(self, engine: Engine, name: str, key: str | None = None):
    self.engine, self.name, self.links = engine, name, replies.Links()
    self.stopping = asyncio.Event()  # set when the server has been told to stop
    self._key, self._born = key, int(time.time())
    self._metrics, self._limits = engine.metrics, engine.limits

  def app(self, lifespan=None) -> Starlette:
    """The ASGI application."""
    post = lambda path, run: Route(path, self._endpoint(path, run), methods=["POST"])
    get = lambda path, run: Route(path, self._endpoint(path, run), methods=["GET"])
    return Starlette(lifespan=lifespan, exception_handlers={
        HTTPException: http_error, Exception: server_error}, routes=[
            post("/v1/images/generations", self._generate), post("/v1/images/edits", self._edit),
            post("/v1/chat/completions", self._chat), get("/v1/models", self._models),
            get("/v1/models/{name:path}", self._model), get("/health", self._health),
            get("/metrics", self._figures), get("/images/{name}", self._image)])

  def _endpoint(self, path, run):
    """An endpoint that counts requests and turns errors into the API's form."""
    async def endpoint(request: Request):
      try:
        if request.url.path.startswith("/v1/"):
          self._authorize(request)
        reply = await run(request)
      except Refused as e:
        # What is left of a body is not waited for.
        headers = {"Connection": "close"} if e.status in (408, 413) else None
        reply = JSONResponse(replies.error(str(e), "invalid_request_error", e.field, e.code),
                             e.status, headers)
      except Full as e:
        reply = JSONResponse(replies.error("the queue is full; try again later", "rate_limit_error",
                                           code="queue_full"), 429, {"Retry-After": str(e.args[0])})
      except Closing:
        reply = JSONResponse(replies.error("the server is about to stop", "server_error",
                                           code="stopping"), 503, {"Retry-After": "5"})
      except Late:
        reply = JSONResponse(late(self._limits.seconds), 504)
      except Gone:
        reply = Response(status_code=499)  # nobody reads it
      self._metrics.requests.labels(path, str(reply.status_code)).inc()
      return reply
    return endpoint

  @property
  def locked(self) -> bool:
    """Whether clients must send a key."""
    return self._key is not None

  def accepts(self, key: str) -> bool:
    """Whether it is the key that clients must send."""
    return self.locked and hmac.compare_digest(key.encode(), self._key.encode())

  def _authorize(self, request):
    sent = request.headers.get("authorization", "").removeprefix("Bearer ")
    if self.locked and not self.accepts(sent):
      raise Refused("the API key is missing or wrong: send Authorization: Bearer KEY", None, 401,
                    "invalid_api_key")

  async def _models(self, _):
    return JSONResponse({"object": "list", "data": [self._about()]})

  async def _model(self, request):
    self._check_model(request.path_params["name"])
    return JSONResponse(self._about())

  def _about(self):
    sizes = [f"{width}x{height}" for width, height in self._limits.sizes]
    return {"id": self.name, "object": "model", "created": self._born, "owned_by": "irg_jax",
            "irg": {"sizes": sizes, "rounds": self._limits.rounds, "images": self._limits.images,
                    "n": self._limits.n, "num_inference_steps": self._limits.steps - 1,
                    "max_think_tokens": self.engine.settings.think_limit - 1}}

  def _check_model(self, name):
    if name not in (None, self.name):
      raise Refused(f"model {name!r:.80} is not served here, only {self.name!r}", "model", 404,
                    "model_not_found")

  async def _health(self, _):
    waiting, running = self.engine.load
    ready = self.engine.ready.is_set()
    body = {"status": "ok" if ready else "compiling", "waiting": waiting, "running": running}
    return JSONResponse(body, 200 if ready else 503)

  async def _figures(self, _):
    for state, count in zip(("waiting", "running"), self.engine.load):
      self._metrics.rows.labels(state).set(count)
    return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

  async def _image(self, request):
    data = self.links.get(request.path_params["name"])
    if data is None:
      raise Refused("no such image; images are kept in memory, the newest ones only", None, 404,
                    "not_found")
    return Response(data, media_type="image/png")

  async def _generate(self, request):
    body = await self._json(request)
    return await self._images(request, fields.read(ImageFields, body), [], "image_generation")

  async def _edit(self, request):
    async with self._form(request) as (texts, files):
      body = fields.from_form(ImageFields, texts)
      if not files:
        raise Refused("image: send the image to edit as a file", "image")
      images = [await self._decoded(data) for data in files[:self._limits.images + 1]]
    return await self._images(request, fields.read(ImageFields, body), images, "image_edit")

  async def _images(self, request, asked: ImageFields, images, kind):
    """Draws; replies with all images, or with events as they come."""
    self._check_model(asked.model)
    works = await asyncio.to_thread(fields.drawings, self.engine, asked, asked.prompt, images)
    link = None
    if asked.response_format == "url":
      link = lambda png: str(request.base_url.replace(path=f"/images/{self.links.add(png)}"))
    ticket = Ticket(self.engine, works)
    if asked.stream:
      return Stream(ticket, self._image_events(ticket, asked, kind, link), self._limits.seconds)
    results = await watched(request.receive, ticket, self._limits.seconds)
    data = [await asyncio.to_thread(replies.image, self.engine, work, rounds, link)
            for work, rounds in zip(works, results)]
    return JSONResponse({
        "created": int(time.time()), "data": data, "background": "opaque", "output_format": "png",
        "size": f"{works[0].settings.width}x{works[0].settings.height}",
        "usage": replies.usage(self.engine, works, results)})

  async def _image_events(self, ticket, asked, kind, link):
    spellers = collections.defaultdict(Speller)  # by row and round
    async for row, found in ticket.events():
      work, place = ticket.works[row], {"index": row, "round": found.round}
      settings = work.settings
      if found.kind in ("text", "round") and settings.think:
        whole = found.kind == "round"
        text = found.value.thought.text if whole else found.value
        if piece := spellers[row, found.round].piece(text, whole):
          yield "irg.thought.delta", {"type": "irg.thought.delta", "delta": piece, **place}
      sent = settings.rounds - 1 if asked.partial_images is None else asked.partial_images
      later = found.kind == "round" and not found.value.kept
      if later and found.round < min(sent, settings.rounds - 1):
        yield f"{kind}.partial_image", replies.image_event(
            f"{kind}.partial_image", settings, partial_image_index=found.round, irg=place,
            **await asyncio.to_thread(replies.shown, found.value, link))
      if found.kind == "done":
        last = await asyncio.to_thread(replies.image, self.engine, work, found.value, link)
        last["irg"] |= {"index": row}
        yield f"{kind}.completed", replies.image_event(
            f"{kind}.completed", settings, **last,
            usage=replies.usage(self.engine, [work], [found.value]))

  async def _chat(self, request):
    body = await self._json(request)
    modalities = body.pop("modalities", None) or ["text"]
    if not isinstance(modalities, list) or not {*map(str, modalities)} <= {"text", "image"}:
      raise Refused("modalities must be a list of \"text\" and \"image\"", "modalities")
    messages = body.pop("messages", None)
    asked = fields.read(ChatFields, body)
    self._check_model(asked.model)
    system, turns = await asyncio.to_thread(fields.read_messages, messages, self._limits.pixels)
    if draws := "image" in modalities:
      texts = [part for part in turns[-1] if isinstance(part, str)]
      images = [part for part in turns[-1] if not isinstance(part, str)]
      works = await asyncio.to_thread(
          fields.drawings, self.engine, asked, "\n".join(texts), images, system)
      if len(works) > 1:
        raise Refused("n: one image for a chat request; send several requests", "n")
    else:
      parts = [part for turn in turns for part in turn]
      works = await asyncio.to_thread(fields.answers, self.engine, asked, parts, system)
    ticket, name = Ticket(self.engine, works), f"chatcmpl-{secrets.token_hex(12)}"
    if asked.stream:
      usage = isinstance(body.get("stream_options"), dict) and (
          body["stream_options"].get("include_usage") is True)
      return Stream(ticket, self._chat_events(ticket, name, draws, usage), self._limits.seconds,
                     end="[DONE]")
    result, = await watched(request.receive, ticket, self._limits.seconds)
    message, finish, tokens = await asyncio.to_thread(self._message, works[0], result, draws)
    return JSONResponse(replies.chat(
        name, self.name, {"message": {"role": "assistant", **message}, "finish_reason": finish},
        usage=replies.chat_usage(self.engine, works[0], tokens)))

  def _message(self, work, result, draws):
    """(fields of the assistant's message, finish_reason, tokens written)."""
    if not draws:
      return {"content": result.text}, "length" if result.hit_limit else "stop", len(result.ids)
    return {"content": result[-1].thought.text, "images": [replies.data_url(result[-1])],
            "irg": replies.story(self.engine, work, result, replies.png_url)}, "stop", sum(
                len(r.thought.ids) for r in result)

  async def _chat_events(self, ticket, name, draws, with_usage):
    chunk = lambda delta, finish=None, **more: (None, replies.chat(
        name, self.name, {"delta": delta, "finish_reason": finish}, "chat.completion.chunk",
        **more))
    spellers, work = collections.defaultdict(Speller), ticket.works[0]  # by round
    last = work.settings.rounds - 1 if draws else 0
    yield chunk({"role": "assistant", "content": ""})
    async for _, found in ticket.events():
      text = {"text": lambda: found.value, "round": lambda: found.value.thought.text,
              "done": lambda: "" if draws else found.value.text}[found.kind]()
      if piece := spellers[found.round].piece(text, found.kind != "text"):
        yield chunk({"content": piece} if found.round == last else
                    {"irg": {"round": found.round, "thought": piece}})
      if found.kind == "round":
        part = await asyncio.to_thread(replies.data_url, found.value)
        if found.value.kept and found.round < last:  # only now is it known to be the last
          last = found.round
          yield chunk({"content": text})
        yield chunk({"images": [part]} if found.round == last else
                    {"irg": {"round": found.round, "image": part}})
      if found.kind == "done":
        _, finish, tokens = await asyncio.to_thread(self._message, work, found.value, draws)
        yield chunk({}, finish)
        if with_usage:
          yield None, replies.chat(name, self.name, {}, "chat.completion.chunk", usage=(
              replies.chat_usage(self.engine, work, tokens))) | {"choices": []}

  async def _decoded(self, data):
    return await asyncio.to_thread(fields.read_image, data, "image", self._limits.pixels)

  async def _json(self, request) -> dict:
    """The JSON object of a request's body."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if kind != "application/json":
      raise Refused(f"content type {kind!r:.80}: send application/json", None, 415)
    data = await self._body(request)
    try:
      body = json.loads(data)
    except (ValueError, RecursionError) as e:
      raise Refused(f"the body is not JSON: {e}") from e
    if not isinstance(body, dict):
      raise Refused("the body must be a JSON object")
    return body

  async def _body(self, request) -> bytes:
    """The body, within the bounds of bytes and seconds."""
    size, parts = 0, []
    try:
      async with asyncio.timeout(self._limits.read_seconds):
        async for part in request.stream():
          if (size := size + len(part)) > self._limits.body:
            raise Refused(f"the body has more than {self._limits.body:,} bytes", None, 413,
                          "too_large")
          parts.append(part)
    except TimeoutError as e:
      raise Refused("the body did not arrive in time", None, 408, "timeout") from e
    return b"".join(parts)

  @contextlib.asynccontextmanager
  async def _form(self, request):
    """(texts by name, contents of files) of a multipart body; files stay in memory."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
      raise Refused("send the image and the fields as multipart/form-data", None, 415)
    body = await self._body(request)

    async def stream():
      yield body

    class Parser(MultiPartParser):
      spool_max_size = max_file_size = self._limits.body

    try:
      form = await Parser(Headers(scope=request.scope), stream(), max_files=_FIELDS,
                          max_fields=_FIELDS, max_part_size=2**20).parse()
    except (MultiPartException, ValueError, KeyError) as e:
      raise Refused(f"the form cannot be read: {e}") from e
    texts, files = {}, []
    try:
      for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
          texts[name] = value
        elif name in ("image", "image[]"):
          files.append(await value.read())
        else:
          raise Refused(f"file {name!r:.80} is not supported, only image", name[:80])
      yield texts, files
    finally:
      await form.close()
