"""Requests of the page of `irg demo`: what it shows of them as work goes on, as HTML.

Nothing here knows Gradio. The templates (reports/templates/demo_*.html) escape all texts.
"""

import asyncio
import collections
import contextlib
import io
import pathlib
import tempfile
import traceback
import zipfile

from irg_jax.generate import irg
from irg_jax.images import encode_image, resize_to
from irg_jax.reports import pages, trace
from irg_jax.serve import fields, replies
from irg_jax.serve.engine import Closing, Engine, Full
from irg_jax.serve.fields import ChatFields, ImageFields, Refused
from irg_jax.serve.tickets import Gone, Late, Ticket
from irg_jax.serve.work import Event, Work

_SESSIONS, _KEPT = 256, 24  # open pages whose images are remembered, and images of each
_THUMB = 256  # pixels of the longest side
# Prompts to try; those that a model has a note on are not offered.
_EXAMPLES = (
    "two red circles left of a blue star", "an orange ring above a purple cross",
    "three green squares and a yellow triangle", "four pink diamonds",
    "a red cube on top of a blue sphere", "a fox reading a newspaper in the rain, oil painting")


class Showing:
  """The requests of all open pages, each of which is a session with a name.

  Args:
    engine: draws and answers.
    links: images behind the URLs images/NAME.
    name: of the model, in traces.
  """

  def __init__(self, engine: Engine, links: replies.Links, name: str):
    self._engine, self._links, self._name = engine, links, name
    self.traces = replies.Links()  # zip files, behind the URLs traces/NAME
    self._tickets = collections.defaultdict(set)  # of each session
    self._galleries = collections.OrderedDict()  # of each session: its images, the newest first

  @property
  def busy(self) -> bool:
    """Whether a request of a page waits or runs."""
    return bool(self._tickets)

  @property
  def examples(self) -> list[str]:
    """Prompts that the model has no note on."""
    defaults = self._engine.generator.defaults
    return [p for p in _EXAMPLES if not defaults.read(p, self._engine.settings).note]

  def banner(self) -> str:
    """HTML of what holds for the whole page: what the model knows, and what it waits for."""
    return pages.render("demo_banner", serves=self._engine.serves,
                        note=self._engine.generator.defaults.prompts.note)

  def draw(self, session: str, prompt: str, files=(), **options):
    """Draws; an async generator of HTML, whenever there is more to see or if there was an error.

    Args:
      session: name of the page.
      prompt: the image, or the change, in words.
      files: contents of image files to edit.
      options: fields of `fields.ImageFields`; texts as in a form, those that are None or empty
        count as left out.
    """
    def make():
      asked = _read(ImageFields, options)
      return fields.drawings(self._engine, asked, prompt, self._images(files))

    return self._run(session, "demo_rounds", make, self._drawn)

  def ask(self, session: str, question: str, files=(), **options):
    """Answers in text, as `draw` does; `options` are fields of `fields.ChatFields`."""
    def make():
      asked = _read(ChatFields, options)
      if not (question or "").strip():
        raise Refused("write a question")
      return fields.answers(self._engine, asked, [*self._images(files), question.strip()])

    return self._run(session, "demo_answer", make, self._answered)

  def stop(self, session: str) -> None:
    """Frees the rows of a session; its requests end with a word on that. In the event loop."""
    for ticket in list(self._tickets.get(session, ())):
      ticket.end(Gone())

  def gallery(self, session: str) -> str:
    """HTML of the session's images."""
    return pages.render("demo_gallery", entries=list(self._galleries.get(session, ())))

  async def _run(self, session, template, make, take):
    """Yields the HTML of a request: as it waits, at each event, and at its end.

    Args:
      make: function that returns its only work; `Refused` if it cannot be served.
      take: function (session, view, work, event) that puts an event into the template's view.
    """
    view = {"status": "Reading the request"}
    show = lambda **more: pages.render(template, **view, **more)
    try:
      work, = await asyncio.to_thread(make)
      view |= self._begun(work)
      with self._ticket(session, work) as ticket:
        yield show()
        async with contextlib.aclosing(ticket.events()) as events:
          async for _, event in events:
            await asyncio.to_thread(take, session, view, work, event)
            yield show()
    except Exception as e:
      view["status"] = None
      yield show(error=self._reason(e), stopped=isinstance(e, Gone))

  @contextlib.contextmanager
  def _ticket(self, session, work):
    """The row of a request, which ends with its listener, its session and its time."""
    ticket, loop = Ticket(self._engine, [work]), asyncio.get_running_loop()
    timer = loop.call_later(self._engine.limits.seconds, ticket.end, Late())
    self._tickets[session].add(ticket)
    try:
      yield ticket
    finally:
      timer.cancel()
      ticket.cancel()
      self._tickets[session].discard(ticket)
      if not self._tickets[session]:
        del self._tickets[session]

  def _begun(self, work: Work) -> dict:
    """The page of a request that waits."""
    (waiting, running), settings = self._engine.load, work.settings
    reading = self._engine.generator.defaults.read(work.prompt, settings, bool(work.images))
    status = ("The server has just started: the first image waits until its programs are compiled"
              if not self._engine.serves else
              f"In the queue, {waiting} waiting and {running} running" if waiting or running else
              "Starting")
    view = {"status": status, "settings": settings, "seed": work.seed}
    if work.conversation is not None:
      return view
    return view | reading.record | {
        "prompt": work.prompt, "rounds": [{} for _ in range(settings.rounds)],
        "sources": [self._shown(image) for image in work.images]}

  def _drawn(self, session, view, work: Work, event: Event):
    rounds, number, total = view["rounds"], event.round, work.settings.rounds
    if event.kind == "text":
      rounds[number] = {"text": event.value.rstrip("\ufffd")}
    if event.kind == "round":
      thought = event.value.thought
      rounds[number] = {"think": thought.text if work.settings.think else None,
                        "hit_limit": thought.hit_limit, "kept": event.value.kept,
                        **self._shown(event.value.image)}
      number += 1
      if event.value.kept:
        del rounds[number:]
    view["status"] = None
    if event.kind == "done":
      data = pack_trace(self._record(work, event.value))
      view |= {"trace": f"traces/{self.traces.add(data, '.zip')}",
               "seconds": sum(sum(r.seconds.values()) for r in event.value)}
      self._remember(session, view, event.value[-1].image)
    elif number < len(rounds):
      doing = "thinking, then drawing" if not number else "looking, thinking, drawing again"
      view["status"] = f"Image {number + 1} of {total}: {doing}"

  def _answered(self, session, view, work: Work, event: Event):
    if event.kind == "text":
      view |= {"status": "Answering", "text": event.value.rstrip("\ufffd")}
    if event.kind == "done":
      view |= {"status": None, "text": event.value.text, "hit_limit": event.value.hit_limit,
               "done": True}

  def _shown(self, image) -> dict:
    """Values of the templates for an image, uint8 [height, width, 3]."""
    png = encode_image(image)
    return {"url": f"images/{self._links.add(png)}", "small": pages.small(png),
            "width": image.shape[1], "height": image.shape[0]}

  def _record(self, work, rounds) -> dict:
    """The trace of a drawing; it names no folder of this machine."""
    record = self._engine.generator.record(
        irg.Trajectory(work.prompt, rounds), work.settings, work.system_prompt, work.seed, 1,
        work.images)
    used = record["settings"]
    hidden = {"lora": pathlib.Path(used["lora"]).name} if used.get("lora") else {}
    return record | {"checkpoint": self._name, "settings": used | hidden}

  def _remember(self, session, view, image):
    """Puts a drawing in front of the session's gallery."""
    gallery = self._galleries.setdefault(session, collections.deque(maxlen=_KEPT))
    self._galleries.move_to_end(session)
    if len(self._galleries) > _SESSIONS:
      self._galleries.popitem(last=False)
    gallery.appendleft({"prompt": view["prompt"], "seed": view["seed"], "trace": view["trace"],
                        "url": view["rounds"][-1]["url"], "thumb": thumbnail(image),
                        "small": view["rounds"][-1]["small"]})

  def _images(self, files):
    if any(data is None for data in files):
      raise Refused("choose an image first")
    return [fields.read_image(data, "image", self._engine.limits.pixels) for data in files]

  def _reason(self, e) -> str:
    """An error in a sentence; what the server's maintainer must know goes to its log."""
    if isinstance(e, Refused):
      return str(e)
    if isinstance(e, Full):
      return f"The queue is full. Try again in {e.args[0]} seconds."
    if isinstance(e, Closing):
      return "The server is about to stop."
    if isinstance(e, Late):
      return f"This took longer than {self._engine.limits.seconds:g} seconds and was ended."
    if isinstance(e, Gone):
      return "Stopped."
    traceback.print_exception(e)
    return "The server failed; its log says why."


def _read(kind, options):
  """Fields of class `kind`, see `Showing.draw`."""
  given = {name: value for name, value in options.items() if value not in (None, "")}
  texts = {name: value.strip() for name, value in given.items() if isinstance(value, str)}
  return fields.read(kind, given | fields.from_form(kind, texts))


def pack_trace(record: dict) -> bytes:
  """A zip file of what `trace.write_trace` writes."""
  file = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    trace.write_trace(pathlib.Path(folder) / "trace", record)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
      for path in sorted(pathlib.Path(folder).rglob("*")):
        archive.write(path, path.relative_to(folder))
  return file.getvalue()


def thumbnail(image) -> str:
  """A data: URL of an image, at most `_THUMB` pixels wide and high."""
  height, width, _ = image.shape
  scale = min(1.0, _THUMB / max(height, width))
  small = resize_to(image, max(1, round(width * scale)), max(1, round(height * scale)))
  if scale == 1.0:
    return pages.data_uri(encode_image(small))
  return pages.data_uri(encode_image(small, "JPEG", quality=85), "jpeg")
