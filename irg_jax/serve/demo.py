"""A page that shows the model thinking, drawing, looking and drawing again (Gradio).

It runs in the process of the API, on the same engine. Gradio keeps an uploaded image as a file, in
a folder that is removed at the end; drawings and traces are held in memory.
"""

import asyncio
import contextlib
import os
import pathlib
import tempfile

import gradio as gr
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from irg_jax.reports import pages
from irg_jax.serve import replies
from irg_jax.serve.api import Server
from irg_jax.serve.showing import Showing

# What the browser may load: nothing from elsewhere. Gradio makes functions from texts of its own.
_POLICY = ("default-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
           "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; object-src 'none'; "
           "base-uri 'self'; form-action 'self'")
_UPLOADS = 8  # images of the largest size that are kept, of all pages together
_MOST_GUIDANCE = 10.0
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}  # of events


def page(api: Server, app):
  """Adds the page to the API's Starlette application, at /; returns an ASGI application."""
  uploads = tempfile.TemporaryDirectory(prefix="irg-demo-", ignore_cleanup_errors=True)
  os.environ["GRADIO_TEMP_DIR"] = uploads.name  # Gradio has no other way to say so
  showing = Showing(api.engine, api.links, api.name)
  blocks = _blocks(api, showing)
  app.router.routes += [Route("/traces/{name}", _traces(showing)), Route("/v1/{rest:path}", _none)]
  app.router.lifespan_context = _removing(app.router.lifespan_context, uploads)
  system = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
  app = gr.mount_gradio_app(
      app, blocks, path="/", footer_links=[], run_history=False, show_error=False, ssr_mode=False,
      max_file_size=api.engine.limits.body, enable_monitoring=False, pwa=False, mcp_server=False,
      auth=(lambda _, key: api.accepts(key)) if api.locked else None,
      auth_message="Any name, and the key of this server as the password.",
      css=pages.render("demo.css"), theme=gr.themes.Default(font=system[0], font_mono=system[1]))
  _close_streams(api, showing, app)
  return _Guard(app, api.engine.limits.body, pathlib.Path(uploads.name))


def _blocks(api, showing):
  """The page's components and what they do."""
  with gr.Blocks(title="irg demo", analytics_enabled=False, delete_cache=(60, 3600)) as blocks:
    banner, gallery = _html(showing.banner()), _html(render=False)
    with gr.Tabs():
      with gr.Tab("Draw", elem_id="draw"):
        _drawing(api, showing, [gallery, banner], 0)
      if count := api.engine.limits.images:
        with gr.Tab("Edit", elem_id="edit"):
          _drawing(api, showing, [gallery, banner], count)
      with gr.Tab("Ask", elem_id="ask"):
        _asking(api, showing, banner)
    gallery.render()

    async def left(request: gr.Request):
      showing.stop(request.session_hash)

    blocks.unload(left)
    blocks.load(showing.banner, None, banner, queue=False, **_QUIET)
  blocks.queue(default_concurrency_limit=None)  # the engine has a queue, and runs rows side by side
  return blocks


def _drawing(api, showing, shared, images):
  """A tab that draws, or edits so many images."""
  with gr.Row():
    uploads = [_upload() for _ in range(images)]
    with gr.Column(scale=3):
      prompt = gr.Textbox(label="Change" if images else "Prompt", lines=2, max_lines=6,
                          max_length=20_000, submit_btn=False, autofocus=not images)
      start, stop = _buttons("Edit" if images else "Draw")
  if not images and showing.examples:
    gr.Examples(showing.examples, prompt, label="Try", cache_examples=False)
  names, controls = _controls(api.engine)
  panel = _html()

  async def run(request: gr.Request, text, *values):
    options = dict(zip(names, values[images:]))
    changed = {name: value for name, value in options.items() if value != names[name]}
    async with contextlib.aclosing(
        showing.draw(request.session_hash, text, values[:images], **changed)) as steps:
      async for html in steps:
        yield html, gr.skip(), gr.skip()
    yield gr.skip(), showing.gallery(request.session_hash), showing.banner()

  _on(showing, start, prompt, stop, run, [prompt, *uploads, *controls], [panel, *shared])


def _asking(api, showing, banner):
  """A tab for questions about images, or without one."""
  with gr.Row():
    uploads = [_upload(" (may be left out)") for _ in range(api.engine.limits.images)]
    with gr.Column(scale=3):
      question = gr.Textbox(label="Question", lines=2, max_lines=6, max_length=20_000)
      start, stop = _buttons("Ask")
      with gr.Accordion("Settings", open=False):
        seed = _seed()
  panel = _html()

  async def run(request: gr.Request, text, number, *files):
    files = [data for data in files if data is not None]
    async with contextlib.aclosing(
        showing.ask(request.session_hash, text, files, seed=number)) as steps:
      async for html in steps:
        yield html, gr.skip()
    yield gr.skip(), showing.banner()

  _on(showing, start, question, stop, run, [question, seed, *uploads], [panel, banner])


def _on(showing, start, text, stop, run, inputs, outputs):
  """Connects the buttons of a tab, and the key Enter in its text."""
  gr.on([start.click, text.submit], run, inputs, outputs, concurrency_limit=None, **_QUIET)

  async def halt(request: gr.Request):
    showing.stop(request.session_hash)

  stop.click(halt, queue=False, **_QUIET)


def _controls(engine):
  """({field of a request: its default, which is not sent}, the components in the same order)."""
  limits, settings = engine.limits, engine.settings
  sizes = [f"{width}x{height}" for width, height in limits.sizes]
  size = f"{settings.width}x{settings.height}"
  rounds = limits.rounds if settings.think else 1
  guidance = settings.first.text_scale, settings.later.image_scale
  most = max(_MOST_GUIDANCE, *guidance)
  with gr.Row():
    made = [gr.Dropdown(sizes, value=size, label="Size", min_width=140),
            gr.Dropdown(list(range(1, rounds + 1)), value=settings.rounds, label="Rounds",
                        min_width=140),
            _seed()]
  with gr.Accordion("Settings", open=False), gr.Row():
    made += [
        gr.Slider(1, limits.steps - 1, settings.steps - 1, step=1, label="Steps of an image"),
        gr.Slider(0, most, guidance[0], step=0.1, label="Text guidance", info="1 or less: none"),
        gr.Slider(0, most, guidance[1], step=0.1, label="Image guidance", info="1 or less: none")]
  return {"size": size, "rounds": settings.rounds, "seed": "",
          "num_inference_steps": settings.steps - 1, "guidance_scale": guidance[0],
          "true_cfg_scale": guidance[1]}, made


def _seed():
  return gr.Textbox(label="Seed", placeholder="drawn anew", max_length=20, min_width=140)


def _buttons(verb):
  with gr.Row():
    return (gr.Button(verb, variant="primary", scale=2, min_width=120),
            gr.Button("Stop", min_width=80))


def _html(value="", **options):
  return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def _upload(more=""):
  """An image of the visitor's; handlers get its file's content, not decoded, or None."""
  image = gr.Image(label=f"Image{more}", sources=["upload", "clipboard"], type="filepath",
                   height=220, scale=2, min_width=200)
  image.preprocess = _content
  return image


def _content(upload):
  path = upload and pathlib.Path(upload.path)
  return path.read_bytes() if path and path.is_file() else None  # removed after an hour


def _traces(showing):
  async def reply(request):
    data = showing.traces.get(request.path_params["name"])
    if data is None:
      return JSONResponse(replies.error("no such trace; traces are kept in memory, the newest ones "
                                        "only", "invalid_request_error", code="not_found"), 404)
    return Response(data, media_type="application/zip", headers={
        "Content-Disposition": 'attachment; filename="trace.zip"'})
  return reply


async def _none(_):
  raise HTTPException(404)  # in the API's form, not the page's


def _removing(lifespan, folder):
  """`lifespan`, at whose end a temporary folder is removed."""
  @contextlib.asynccontextmanager
  async def wrapped(app):
    try:
      async with lifespan(app) as state:
        yield state
    finally:
      folder.cleanup()
  return wrapped


def _close_streams(api, showing, app):
  """Ends the streams of open pages once the server stops and no request of a page is left."""
  old, gradio = app.router.lifespan_context, app.routes[-1].app

  async def attend():
    await api.stopping.wait()
    while showing.busy:
      await asyncio.sleep(0.1)
    gradio.stop_event.set()

  @contextlib.asynccontextmanager
  async def lifespan(scope):
    task = asyncio.ensure_future(attend())
    try:
      async with old(scope) as state:
        yield state
    finally:
      task.cancel()

  app.router.lifespan_context = lifespan


class _Guard:
  """Bounds what a page's requests send and keep, and what its browser may load.

  Args:
    app: the ASGI application.
    body: bytes of a request.
    uploads: folder of uploaded files.
  """

  def __init__(self, app, body: int, uploads: pathlib.Path):
    self._app, self._body, self._uploads = app, body, uploads

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http" or scope["path"].startswith("/v1/"):  # the API has its own bounds
      await self._app(scope, receive, send)
    elif refusal := await self._refusal(scope):
      await refusal(scope, receive, send)
    else:
      await self._app(scope, receive, lambda message: send(_with_policy(message)))

  async def _refusal(self, scope):
    headers = dict(scope["headers"])
    size = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers or not size.isdigit():
      return PlainTextResponse("send the length of the body", 411)
    if int(size) > self._body:
      return PlainTextResponse(f"more than {self._body:,} bytes", 413)
    if scope["path"].endswith("/upload") and (
        await asyncio.to_thread(self._kept) > _UPLOADS * self._body):
      return PlainTextResponse("too many images are kept here; try again later", 503)
    return None

  def _kept(self):
    """Bytes of uploaded files."""
    sizes = []
    for path in self._uploads.rglob("*"):
      with contextlib.suppress(OSError):  # removed just now
        sizes.append(path.stat().st_size)
    return sum(sizes)


def _with_policy(message):
  if message["type"] != "http.response.start":
    return message
  return message | {"headers": [*message.get("headers", ()), (
      b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff")]}
