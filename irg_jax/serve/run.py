"""One `irg serve`, from flags to a server: check, read weights, compile, answer requests."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import sys
import threading

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from irg_jax import messages, weights
from irg_jax.generate import generator
from irg_jax.generate.settings import Settings, read_defaults
from irg_jax.progress import Progress
from irg_jax.serve.api import Server
from irg_jax.serve.engine import Engine
from irg_jax.serve.metrics import Metrics
from irg_jax.serve.work import Limits
from irg_jax.tokenizer import load_tokenizer

KEY = "IRG_API_KEY"  # environment variable: the key that clients must send
_HEADERS = 2**15  # bytes of a request's headers
_HEADER_SECONDS = 20.0  # until they have arrived
_CONNECTIONS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """Inputs of one `irg serve`."""

  checkpoint: pathlib.Path
  settings: Settings
  system_prompt: str
  limits: Limits
  host: str
  port: int
  name: str  # of the model in the API
  load: dict  # other arguments of `generator.load`


def run_serve(inputs: Inputs, page=None) -> None:
  """Serves until SIGINT or SIGTERM, then finishes what runs.

  Args:
    page: function (`api.Server`, ASGI app) -> ASGI app, which adds pages; None: the API alone.

  Raises:
    ValueError: the checkpoint, settings or limits cannot work.
    OSError: the address cannot be used.
  """
  config = weights.read_config(inputs.checkpoint)
  tokenizer = load_tokenizer(inputs.checkpoint, config.llm.vocab_size)
  read_defaults(inputs.checkpoint).check(inputs.settings)
  settings = inputs.limits.settings(config, tokenizer, inputs.settings, inputs.system_prompt)
  metrics = Metrics()
  with _listening(inputs.host, inputs.port) as listener, Progress() as progress:
    loaded = generator.load(inputs.checkpoint, on_progress=progress, **inputs.load)
    limits = inputs.limits
    if limits.workers == 0:
      alone = loaded.mesh.size == 1 and loaded.mesh.devices.flat[0].platform == "cpu"
      limits = dataclasses.replace(limits, workers=2 if alone and (os.cpu_count() or 1) > 1 else 1)
    engine = Engine(loaded, settings, inputs.system_prompt, limits, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_):
      engine.start(progress)
      threading.Thread(target=_attend, args=(engine, server), daemon=True).start()
      yield
      await asyncio.to_thread(engine.close)

    api = Server(engine, inputs.name, os.environ.get(KEY) or None)
    app = api.app(lifespan)
    server = _Server(api, http_config(page(api, app) if page else app))
    print(f"listening on http://{inputs.host}:{listener.getsockname()[1]}; requests wait until "
          "their programs are compiled", file=sys.stderr, flush=True)
    with _handled_signals():
      server.run(sockets=[listener])
  metrics.close()
  if engine.failure is not None:
    raise ValueError(f"one image does not run here: {messages.message(engine.failure)}")


def http_config(app) -> uvicorn.Config:
  """The HTTP server's bounds."""
  return uvicorn.Config(
      app, log_level="warning", http=_Protocol, ws="none", lifespan="on", server_header=False,
      h11_max_incomplete_event_size=_HEADERS, limit_concurrency=_CONNECTIONS)


def _listening(host, port):
  """A socket bound to the address; OSError names it."""
  try:
    return socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
  except OSError as e:
    raise OSError(f"--host {host} --port {port}: cannot listen there ({e.strerror or e})") from e


def _attend(engine, server):
  """Says when all is compiled; stops the server where nothing runs."""
  while not engine.ready.wait(0.2):
    if engine.failure is not None:
      server.should_exit = True
      return
  print("ready: all programs are compiled", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _handled_signals():
  """The server raises the signal that ended it once more; it has done its work by then."""
  old = {name: signal.signal(name, lambda *_: None) for name in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for name, handler in old.items():
      signal.signal(name, handler)


class _Server(uvicorn.Server):
  """Tells an `api.Server` when it begins to stop, so that streams without an end close."""

  def __init__(self, api, config):
    super().__init__(config)
    self._api = api

  async def shutdown(self, sockets=None):
    self._api.stopping.set()
    await super().shutdown(sockets)


class _Protocol(H11Protocol):
  """HTTP/1.1 that closes connections on which headers take longer than `_HEADER_SECONDS`."""

  def connection_made(self, transport):
    super().connection_made(transport)
    self._seen = self.cycle
    self._timer = self.loop.call_later(_HEADER_SECONDS, self._check)

  def connection_lost(self, exc):
    self._timer.cancel()
    super().connection_lost(exc)

  def _check(self):
    busy = self.cycle is not None and not self.cycle.response_complete
    idle = self.timeout_keep_alive_task is not None  # nothing has come since the last response
    if not busy and not idle and self.cycle is self._seen:
      self.transport.close()
    self._seen = self.cycle
    self._timer = self.loop.call_later(_HEADER_SECONDS, self._check)
