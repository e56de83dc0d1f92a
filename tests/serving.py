"""A server in this process whose images follow from all that was asked, drawn in no time."""

import contextlib
import hashlib
import socket
import threading
import time

import jax
import numpy as np
import uvicorn

from irg_jax.generate import answer, generator, irg, stopping
from irg_jax.serve import run
from irg_jax.serve.api import Server
from irg_jax.serve.engine import Engine
from irg_jax.serve.metrics import Metrics
from irg_jax.serve.work import Limits

THOUGHT = "a plan for {} — naïve, 第{} — with seed {} and {} images, so it may be drawn"


def text_of(prompt, seed, number, images=()):
  return THOUGHT.format(prompt, number + 1, seed, len(images))


def image_of(prompt, seed, number, settings, images=()):
  used = [prompt, seed, number, settings.steps, settings.timestep_shift, settings.first,
          settings.later, settings.think, settings.think_limit, settings.temperature,
          [x.tobytes() for x in images]]
  digest = hashlib.sha256(repr(used).encode()).digest()
  return np.resize(np.frombuffer(digest, np.uint8), (settings.height, settings.width, 3))


class Drawer:
  """Stands in for `irg.generate` and `answer.answer`; notes the batches that it draws."""

  def __init__(self, seconds: float = 0.0):
    self.seconds, self.batches, self.gate = seconds, [], threading.Event()
    self.gate.set()

  def _write(self, number, texts, on_text, on_progress):
    for end in range(0, max(map(len, texts)) + 1, 9):
      on_progress("think", number, end, 99)
      on_text(number, [text[:end] for text in texts])
      time.sleep(self.seconds / 10)
      while not self.gate.wait(0.01):
        on_progress("think", number, end, 99)
    on_text(number, texts)

  def draw(self, model, params, tokenizer, prompts, *, seeds, settings, system_prompt, images, done,
           on_result, satisfied, on_progress=lambda *_: None, on_text=lambda *_: None,
           room=None):
    number = len(done)
    self.batches.append((list(prompts), number, settings, system_prompt))
    images = images or [()] * len(prompts)
    texts = [text_of(*row[:2], number, row[2]) for row in zip(prompts, seeds, images)]
    if settings.think:
      self._write(number, texts, on_text, on_progress)
    thoughts = [irg.Thought(text, tuple(tokenizer.encode(text))) if settings.think
                else irg.Thought() for text in texts]
    kept = stopping.kept(settings, satisfied, done and done[-1], thoughts, {"think": 0.1})
    return [irg.Trajectory(prompt, [rows[i] for rows in done] + [kept[i] or irg.Round(
        thoughts[i], None, image_of(prompt, seed, number, settings, sources),
        {"think": 0.1, "draw": 0.2})])
        for i, (prompt, seed, sources) in enumerate(zip(prompts, seeds, images))]

  def answer(self, model, params, tokenizer, conversations, *, seeds, settings, system_prompt,
             on_text, on_progress=lambda *_: None, room=None):
    self.batches.append((list(conversations), 0, settings, system_prompt))
    shown = lambda part: part if isinstance(part, str) else f"<{part.shape[1]}x{part.shape[0]}>"
    texts = [f"{system_prompt} {seed} {settings.think_limit}: " + " / ".join(map(shown, parts))
             for parts, seed in zip(conversations, seeds)]
    self._write(0, texts, on_text, on_progress)
    return [irg.Thought(text, (1, 2, 3), len(text) > settings.think_limit * 8) for text in texts]


@contextlib.contextmanager
def serving(checkpoint, monkeypatch, drawer: Drawer, key=None, **limits):
  """Yields (`api.Server`, address) of a server that draws with `drawer`."""
  monkeypatch.setattr(irg, "generate", drawer.draw)
  monkeypatch.setattr(answer, "answer", drawer.answer)
  monkeypatch.setattr(Engine, "_cases", lambda self: [(n, lambda: None) for n in (
      self.limits.batch_sizes)])
  loaded = generator.load(checkpoint)
  settings, prompt = loaded.settings, loaded.defaults.system_prompt
  limits = Limits(**{"sizes": ((48, 32), (32, 32)), "batch_size": 4, "rounds": 3, "steps": 20,
                     "images": 2, "read_seconds": 2.0} | limits)
  metrics = Metrics()
  engine = Engine(loaded, limits.settings(
      loaded.model.config, loaded.tokenizer, settings, prompt), prompt, limits, metrics)
  api = Server(engine, "tiny", key)

  @contextlib.asynccontextmanager
  async def lifespan(_):
    engine.start()
    yield

  server = uvicorn.Server(run.http_config(api.app(lifespan)))
  with socket.create_server(("127.0.0.1", 0)) as listener:
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
      assert engine.ready.wait(30)
      yield api, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
      drawer.gate.set()
      server.should_exit = True
      thread.join()
      engine.close()
      metrics.close()
