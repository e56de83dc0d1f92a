"""Fields of requests: their types and bounds, and the `work.Work`s that they ask for.

Fields have OpenAI's names, and for what OpenAI's API lacks those of other servers of image models.
docs/serve.md lists them from the classes below. A field that is unknown, or that asks for something
that is not done here, is refused by name.
"""

import base64
import binascii
import dataclasses
import math
import random
import re
import typing

import numpy as np
from PIL import Image

from irg_jax import images as images_lib
from irg_jax.config import setting, update
from irg_jax.config import check as check_bounds
from irg_jax.generate import answer
from irg_jax.generate.generator import check_lengths
from irg_jax.generate.settings import Settings, check_prompts, expand
from irg_jax.serve.engine import Engine
from irg_jax.serve.work import Work


class Refused(ValueError):
  """A request that cannot be served: the field that is wrong, if one is, and the HTTP status."""

  def __init__(self, message: str, field: str | None = None, status: int = 400,
               code: str = "invalid_value"):
    super().__init__(message)
    self.field, self.status, self.code = field, status, code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
  """Fields of every request."""

  model: str | None = setting(None, "name of the served model, or left out")
  seed: int | None = setting(
      None, "image number i has the seed `seed + i`; left out: drawn, and told in the reply",
      low=0, high=2**32 - 1)
  n: int = setting(1, "images", low=1)
  size: str = setting("auto", "WIDTHxHEIGHT, one that the server lists; auto: its default")
  stream: bool = setting(False, "server-sent events as work goes on")
  num_inference_steps: int | None = setting(None, "updates of the flow for an image", low=1)
  guidance_scale: float | None = setting(None, "text guidance of all rounds; 1: none", low=0)
  true_cfg_scale: float | None = setting(
      None, "image guidance, of edits and of rounds after an image; 1: none", low=0)
  flow_shift: float | None = setting(None, "warp of the schedule towards noise; 1: none", above=0)
  max_think_tokens: int | None = setting(None, "longest thought in tokens", low=1)
  think_temperature: float | None = setting(
      None, "sampling temperature of thoughts; 0: greedy", low=0)
  rounds: int | None = setting(None, "images drawn one after the other, each better", low=1)
  think: bool | None = setting(None, "write a thought before each image; false: one round")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFields(Drawing):
  """Fields of /v1/images/generations, and of /v1/images/edits beside its images."""

  prompt: str = setting("", "the image, or the change, in words")
  response_format: str = setting("b64_json", "form of images", choices=("b64_json", "url"))
  partial_images: int | None = setting(
      None, "images of earlier rounds to stream; left out: all", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFields(Drawing):
  """Fields of /v1/chat/completions beside `messages` and `modalities`."""

  max_tokens: int | None = setting(None, "longest answer in tokens", low=1)
  max_completion_tokens: int | None = setting(None, "the same, under its newer name", low=1)
  temperature: float | None = setting(None, "sampling temperature of the answer", low=0)


# Fields of OpenAI's that change nothing here, and the values that ask for nothing; None: any value.
NEUTRAL = {
    "user": None, "safety_identifier": None, "metadata": None, "prompt_cache_key": None,
    "quality": ("auto", "standard"), "background": ("auto", "opaque"),
    "moderation": ("auto", "low"), "output_format": ("png",), "output_compression": (100,),
    "store": (False,), "logprobs": (False,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "top_p": (1,), "tools": ([],), "stop": ([],), "response_format": ({"type": "text"},),
    "parallel_tool_calls": None, "service_tier": None, "stream_options": None,
}
# Settings of generation that a field sets.
_SETTINGS = {
    "num_inference_steps": lambda n: {"steps": n + 1},
    "flow_shift": lambda x: {"timestep_shift": x},
    "guidance_scale": lambda x: {"text_scale": x}, "true_cfg_scale": lambda x: {"image_scale": x},
    "max_think_tokens": lambda n: {"think_limit": n + 1}, "rounds": lambda n: {"rounds": n},
    "think_temperature": lambda x: {"temperature": x}, "think": lambda x: {"think": x},
    "max_tokens": lambda n: {"think_limit": n + 1}, "temperature": lambda x: {"temperature": x},
    "max_completion_tokens": lambda n: {"think_limit": n + 1},
}


def read(kind, body: dict):
  """Fields of class `kind` from a JSON object; `Refused` names the field that is wrong."""
  known = typing.get_type_hints(kind)
  given = {name: value for name, value in body.items() if value is not None}
  for name in [name for name in given if name not in known and name in NEUTRAL]:
    value, allowed = given.pop(name), NEUTRAL[name]
    if allowed is not None and value not in allowed:
      raise Refused(f"{name} {value!r:.80} is not supported; leave it out", name,
                    code="unsupported")
  try:
    return check_bounds(update(kind(), given))
  except ValueError as e:
    name = re.match(r"config field '(\w+)", str(e))
    raise Refused(str(e).replace("config field ", "field "), name and name[1]) from e


def from_form(kind, form: dict) -> dict:
  """The JSON object of a form's texts, by the types of the fields of class `kind`."""
  hints, body = typing.get_type_hints(kind), {}
  for name, text in form.items():
    kinds = typing.get_args(hints.get(name, str)) or (hints.get(name, str),)
    try:
      if bool in kinds:
        body[name] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
      else:
        body[name] = int(text) if int in kinds else float(text) if float in kinds else text
    except (KeyError, ValueError) as e:
      raise Refused(f"field {name!r} is {text!r:.80}, but must be {kinds[0].__name__}", name) from e
  return body


def drawings(engine: Engine, fields: Drawing, prompt: str, images,
             system_prompt=None) -> list[Work]:
  """The works of a request to draw, one an image; `images` are to be edited, uint8 [Y, X, 3]."""
  prompt = _text(prompt, "prompt")
  limits = engine.limits
  if fields.n > limits.n:
    raise Refused(f"n {fields.n}: this server draws at most {limits.n} images for a request", "n")
  _check_count(engine, images)
  settings, system = settings_of(engine, fields), _system(engine, system_prompt)
  reading = engine.generator.defaults.read(prompt, settings, bool(images)).text
  images = tuple(fitted(image, limits.sizes) for image in images)
  try:
    check_lengths(engine.generator.model.config, engine.generator.tokenizer, settings, system,
                  [reading], images)
  except ValueError as e:
    raise Refused(str(e).replace("prompt 1", "prompt"), "prompt", code="too_long") from e
  first = random.randrange(2**32 - fields.n) if fields.seed is None else fields.seed
  return [Work(settings=settings, system_prompt=system, seed=(first + i) % 2**32, prompt=prompt,
               images=images) for i in range(fields.n)]


def answers(engine: Engine, fields: ChatFields, conversation, system_prompt=None) -> list[Work]:
  """The work of a request for text; `conversation` holds texts and images in their order."""
  if fields.n != 1:
    raise Refused("n: one answer for a request; send several requests", "n")
  _check_count(engine, [part for part in conversation if not isinstance(part, str)])
  parts = tuple(part if isinstance(part, str) else fitted(part, engine.limits.sizes)
                for part in conversation)
  system = _system(engine, system_prompt)
  work = Work(settings=settings_of(engine, fields), system_prompt=system, conversation=parts,
              seed=random.randrange(2**32) if fields.seed is None else fields.seed)
  try:
    generator = engine.generator
    answer.plan(generator.model.config, generator.tokenizer, work.settings, system, parts)
  except ValueError as e:
    raise Refused(str(e), "messages", code="too_long") from e
  return [work]


def settings_of(engine: Engine, fields: Drawing) -> Settings:
  """The server's settings, changed by a request within the server's limits."""
  changes, limits, base = {}, engine.limits, engine.settings
  for name, change in _SETTINGS.items():
    if (value := getattr(fields, name, None)) is not None:
      changes |= change(value)
  if fields.think is False and fields.rounds is None:
    changes["rounds"] = 1
  for name, most, field in (("steps", limits.steps, "num_inference_steps"),
                            ("rounds", limits.rounds, "rounds"),
                            ("think_limit", base.think_limit, "max_think_tokens")):
    if changes.get(name, 0) > most:
      given = next((f for f in ("max_tokens", "max_completion_tokens")
                    if name == "think_limit" and getattr(fields, f, None)), field)
      raise Refused(f"{given} is {getattr(fields, given)}, but this server allows at most "
                    f"{most if name == 'rounds' else most - 1}", given)
  width, height = _size(fields.size, limits.sizes, (base.width, base.height))
  try:
    settings = update(base, expand(changes | {"size": (width, height)}))
    settings.validate(engine.generator.model.config)
    return settings
  except ValueError as e:
    raise Refused(str(e).replace("config field ", "")) from e


def fitted(image: np.ndarray, sizes) -> np.ndarray:
  """An image in the size of `sizes` (width, height) that distorts it least, then is nearest."""
  height, width, _ = image.shape
  stretch = lambda size: abs(math.log(size[0] / size[1] * height / width))
  scale = lambda size: abs(math.log(size[0] * size[1] / (height * width)))
  return images_lib.resize_to(image, *min(sizes, key=lambda s: (round(stretch(s), 6), scale(s))))


def read_image(data: bytes, name: str, pixels: int) -> np.ndarray:
  """Decodes an image of at most so many pixels, uint8 [Y, X, 3]; `name` is that of its field."""
  try:
    with images_lib.open_image(data) as image:
      large = image.width * image.height > pixels
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    large = True
  except Exception as e:  # decoders raise errors of all kinds
    raise Refused(f"{name}: not an image that can be read; send PNG, JPEG or WebP", name) from e
  if large:
    raise Refused(f"{name}: more than the {pixels:,} pixels that are read here; make the image "
                  "smaller", name, code="too_large")
  try:
    return images_lib.decode_image(data, name)
  except ValueError as e:
    raise Refused(str(e), name) from e


def read_messages(messages, pixels: int) -> tuple[str | None, list[list]]:
  """(system prompt or None, the parts of each other message) of a chat.

  Parts are texts and images uint8 [Y, X, 3]. `Refused` names the message that is wrong.
  """
  if not isinstance(messages, list) or not messages:
    raise Refused("messages must be a list with at least one message", "messages")
  system, turns = [], []
  for number, message in enumerate(messages):
    name = f"messages[{number}]"
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "developer", "user", "assistant"):
      raise Refused(f"{name}: role {role!r:.40} is not system, user or assistant", "messages")
    parts = _parts(message.get("content"), name, pixels)
    parts += _parts(message.get("images") or [], f"{name}.images", pixels)
    if role in ("system", "developer"):
      if turns or not all(isinstance(part, str) for part in parts):
        raise Refused(f"{name}: system messages stand first and are text", "messages")
      system += parts
    else:
      turns.append(parts)
  if not turns or not turns[-1] or messages[-1]["role"] != "user":
    raise Refused("the last message must be a user's, with a text or an image", "messages")
  return ("\n".join(system) if system else None), turns


def _parts(content, name, pixels):
  if content is None or isinstance(content, str):
    return [_text(content, name)] if content and content.strip() else []
  if not isinstance(content, list):
    raise Refused(f"{name}: content must be a text or a list of parts", "messages")
  found = []
  for part in content:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
      found.append(_text(part.get("text"), name))
    elif kind == "image_url" and isinstance(part.get("image_url"), dict):
      found.append(read_image(_data_of(part["image_url"].get("url"), name), name, pixels))
    else:
      raise Refused(f"{name}: a part of type {kind!r:.40} is not text or image_url", "messages")
  return found


def _data_of(url, name):
  """Bytes of a data: URL; other URLs are refused, since the server fetches nothing."""
  head, comma, text = url.partition(",") if isinstance(url, str) else ("", "", "")
  if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
    raise Refused(f"{name}: image URLs must be data:image/...;base64,...; nothing is fetched from "
                  "elsewhere", "messages", code="unsupported")
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as e:
    raise Refused(f"{name}: the image is not base64", "messages") from e


def _text(text, name):
  try:
    return check_prompts([text])[0]
  except ValueError as e:
    raise Refused(f"{name}: {str(e).replace('prompt 1', 'the text')}", name.split("[")[0]) from e


def _system(engine, text):
  return engine.system_prompt if text is None else text.strip()


def _size(text, sizes, default):
  if text == "auto":
    return default
  match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
  if not match or (int(match[1]), int(match[2])) not in sizes:
    known = ", ".join(f"{width}x{height}" for width, height in sizes)
    raise Refused(f"size {text!r:.40}: this server draws {known}", "size")
  return int(match[1]), int(match[2])


def _check_count(engine, images):
  if len(images) > engine.limits.images:
    raise Refused(f"{len(images)} images, but this server reads at most {engine.limits.images} in "
                  "a request", "image", code="too_many")
