"""JSON of replies and of streamed events, in the forms of OpenAI's API.

What that API has no place for is in one field, `irg`: of an image {"seed", "note", "read_as",
"rounds": [{"thought", "tokens", "hit_limit", "b64_json" or "url", "seconds", "kept"}]}, of an event
{"index", "round", ...}. See docs/serve.md.
"""

import base64
import collections
import json
import secrets
import threading
import time

from irg_jax.images import encode_image


class Links:
  """Files behind URLs: held in memory only, the oldest dropped beyond `limit` bytes."""

  def __init__(self, limit: int = 2**26):
    self._limit, self._files, self._lock = limit, collections.OrderedDict(), threading.Lock()

  def add(self, data: bytes, suffix: str = ".png") -> str:
    """Name of a file, not to be guessed."""
    name = f"{secrets.token_urlsafe(16)}{suffix}"
    with self._lock:
      self._files[name] = data
      while sum(map(len, self._files.values())) > self._limit and len(self._files) > 1:
        self._files.popitem(last=False)
    return name

  def get(self, name: str) -> bytes | None:
    with self._lock:
      return self._files.get(name)


def error(message: str, kind: str, field=None, code=None) -> dict:
  """The body of an error."""
  return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def shown(round_, link) -> dict:
  """The image of a round: {"b64_json": ...} or, with `link`, a function of its bytes, {"url"}."""
  png = encode_image(round_.image)
  return {"url": link(png)} if link else {"b64_json": base64.b64encode(png).decode()}


def story(engine, work, rounds, link) -> dict:
  """The field `irg` of an image: all rounds."""
  reading = engine.generator.defaults.read(work.prompt, work.settings, bool(work.images))
  return {"seed": work.seed, **reading.record, "rounds": [
      {"thought": r.thought.text if work.settings.think else None, "tokens": len(r.thought.ids),
       "hit_limit": r.thought.hit_limit, **shown(r, link),
       "seconds": {name: round(value, 3) for name, value in r.seconds.items()},
       **({"kept": True} if r.kept else {})} for r in rounds]}


def image(engine, work, rounds, link) -> dict:
  """An entry of `data` of /v1/images/...: the last image, and its thought."""
  told = story(engine, work, rounds, link)
  last = told["rounds"][-1]
  return {name: last[name] for name in ("b64_json", "url") if name in last} | {
      "revised_prompt": last["thought"], "irg": told}


def usage(engine, works, results) -> dict:
  """Tokens that were read and written; images count as their latent tokens."""
  count = lambda text: len(engine.generator.tokenizer.encode(text))
  config = engine.generator.model.config
  area = lambda w: w.settings.width * w.settings.height // config.pixel_stride**2
  text = sum(count(w.system_prompt) + count(w.prompt) for w in works)
  read = sum(area(w) * len(w.images) for w in works)
  written = sum(len(r.thought.ids) for rounds in results for r in rounds)
  drawn = sum(area(w) for w, rounds in zip(works, results) for r in rounds if not r.kept)
  return {"input_tokens": text + read, "output_tokens": written + drawn,
          "total_tokens": text + read + written + drawn,
          "input_tokens_details": {"text_tokens": text, "image_tokens": read},
          "output_tokens_details": {"text_tokens": written, "image_tokens": drawn}}


def image_event(kind: str, settings, **more) -> dict:
  """A streamed event with an image, of type "image_generation.completed" and the like."""
  return {"type": kind, "created_at": int(time.time()), "background": "opaque", "quality": "auto",
          "output_format": "png", "size": f"{settings.width}x{settings.height}", **more}


def chat_usage(engine, work, tokens: int) -> dict:
  """Tokens of a chat."""
  parts = (work.system_prompt, work.prompt, *(work.conversation or ()))
  read = sum(len(engine.generator.tokenizer.encode(p)) for p in parts if isinstance(p, str))
  return {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}


def chat(name: str, model: str, choice: dict, kind: str = "chat.completion", **more) -> dict:
  """A reply of /v1/chat/completions, or with `kind` a chunk of it."""
  return {"id": name, "object": kind, "created": int(time.time()), "model": model,
          "choices": [{"index": 0, "logprobs": None, **choice}], **more}


def png_url(png: bytes) -> str:
  """A PNG file as a data: URL."""
  return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def data_url(round_) -> dict:
  """A round's image as a part of a message."""
  return {"type": "image_url", "image_url": {"url": png_url(encode_image(round_.image))}}


def event(body: dict | str, name: str | None = None) -> bytes:
  """One server-sent event."""
  text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
  return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()
