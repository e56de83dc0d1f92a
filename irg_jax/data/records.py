"""Rows of IRGL: strict parsing of their JSON into typed parts (docs/spec.md, section 5).

A row is a list of turns. The content of a user turn is a string or, as that of an assistant turn, a
list of parts `{"type": "text" | "image", "content": ..., "need_loss", "need_vae", "need_vit"}`,
images in base64. Defaults of missing flags: need_loss is true for the assistant's texts and false
elsewhere, the others are false. One unusable part makes the whole row unusable: training on the
rest would teach answers to a context that is not there.
"""

import base64
import dataclasses
import json
import urllib.parse

import numpy as np

from irg_jax import images

# Folders of the published form, in the order of docs/spec.md, section 5. The index of a mode is
# its number in a batch.
MODES = (
    "initial_thinking_understanding_learning",
    "initial_thinking_generation_learning",
    "initial_full_learning",
    "improving_thinking_understanding_learning",
    "improving_thinking_generation_learning",
    "improving_full_learning",
)

_FLAGS = ("need_loss", "need_vae", "need_vit")


@dataclasses.dataclass(frozen=True)
class TextPart:
  """A text; a target if `need_loss`."""

  text: str
  need_loss: bool


@dataclasses.dataclass(frozen=True)
class ImagePart:
  """An image in at least one role.

  Attributes:
    data: the encoded image file.
    need_loss: the image is a target.
    need_vae, need_vit: the image is a condition, seen by the VAE, by the ViT.
    moments: float16 or float32 [2, Y, X, C], mean and log-variance of the VAE posterior,
      unscaled; None: not computed yet.
  """

  data: bytes = dataclasses.field(repr=False)
  need_loss: bool
  need_vae: bool
  need_vit: bool
  # Not compared: arrays have no single truth value, and the moments follow from `data`.
  moments: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Record:
  """A usable row; `index` is its number among all rows of the mode, unusable ones included."""

  mode: str
  index: int
  parts: tuple[TextPart | ImagePart, ...]


class Rejected(ValueError):
  """An unusable row: `reason` is a constant name for counting, `detail` the fault and its place."""

  def __init__(self, reason: str, detail: str):
    super().__init__(reason, detail)  # both, else the exception could not be unpickled
    self.reason, self.detail = reason, detail

  def __str__(self):
    return f"{self.reason}: {self.detail}"


def parse_conversation(text, mode: str, index: int, *, decode: bool = True) -> Record:
  """Parses one row of a published parquet file.

  Args:
    text: the JSON, str or UTF-8 bytes; None for a null row.
    decode: also decode each image; false only for rows that are known to be usable.

  Raises:
    Rejected: reason bad_json, bad_turn, unknown_role, no_assistant, unknown_part, bad_content,
      bad_flag, empty_text, bad_text, bad_base64, bad_picture, unused_picture or no_target.
  """
  parts, roles = [], set()
  for number, turn in enumerate(_turns(text)):
    where = f"turn {number}"
    role, content = _turn(turn, where)
    roles.add(role)
    if isinstance(content, str):
      parts.append(_text_part(content, _flags(turn, where, need_loss=False), where))
      continue
    if role == "user" and any(_flags(turn, where, need_loss=False).values()):
      raise Rejected("bad_flag", f"{where}: flags of a list of parts belong to its parts")
    parts += [_part(part, f"{where}, part {i}", role, decode) for i, part in enumerate(content)]
  if "assistant" not in roles:
    raise Rejected("no_assistant", "no turn of the assistant" if roles else "there are no turns")
  if not any(part.need_loss for part in parts):
    raise Rejected("no_target", "no part has need_loss, so there is nothing to learn")
  return Record(mode, index, tuple(parts))


def user(text: str) -> dict:
  """A user turn of a published row."""
  return {"role": "user", "content": text, "need_loss": False}


def assistant(parts: list) -> dict:
  """The assistant turn of a published row, from `text_part` and `image_part`."""
  return {"role": "assistant", "content": parts}


def text_part(text: str, need_loss: bool = True) -> dict:
  """A text of a published row."""
  return {"type": "text", "content": text, "need_loss": need_loss}


def image_part(data: bytes, *, need_loss: bool = False, need_vae: bool = False,
               need_vit: bool = False) -> dict:
  """An image of a published row; `data` is the encoded image file."""
  return {"type": "image", "content": base64.b64encode(data).decode("ascii"),
          "need_loss": need_loss, "need_vae": need_vae, "need_vit": need_vit}


def _turns(text):
  if not isinstance(text, (str, bytes)):
    raise Rejected("bad_json", f"the row is {text!r}, not a text")
  try:
    turns = json.loads(text if isinstance(text, str) else text.decode("utf-8"),
                       object_pairs_hook=_unique)
  except (ValueError, RecursionError) as e:
    raise Rejected("bad_json", str(e)) from e
  if not isinstance(turns, list):
    raise Rejected("bad_json", f"a list of turns was expected, found {_type(turns)}")
  return turns


def _unique(pairs):
  """An object; ValueError for a key that is there twice, of which one would be lost."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError(f"an object has a key twice, of {', '.join(sorted(found))[:80]}")
  return found


def _turn(turn, where):
  """Role and content of a turn."""
  if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
    raise Rejected("bad_turn", f"{where}: not an object with role and content")
  role, content = turn["role"], turn["content"]
  if role not in ("user", "assistant"):
    raise Rejected("unknown_role", f"{where}: role {role!r} is neither user nor assistant")
  if not isinstance(content, (str, list) if role == "user" else list):
    raise Rejected("bad_content", f"{where}: content of the {role} is {_type(content)}, "
                   f"not a {'string or ' * (role == 'user')}list of parts")
  return role, content


def _part(part, where, role, decode):
  if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
    kind = part.get("type") if isinstance(part, dict) else part
    raise Rejected("unknown_part", f"{where}: type {kind!r:.80} is neither text nor image")
  content, is_text = part.get("content"), part["type"] == "text"
  flags = _flags(part, where, need_loss=is_text and role == "assistant")
  if is_text:
    return _text_part(content, flags, where)
  if not any(flags.values()):
    raise Rejected("unused_picture", f"{where}: the image has none of {', '.join(_FLAGS)}")
  if not isinstance(content, str):
    raise Rejected("bad_content", f"{where}: an image's content is {_type(content)}, "
                   "not a base64 string")
  try:
    data = decode_base64(content)
  except ValueError as e:
    raise Rejected("bad_base64", f"{where}: {e}; it begins {content[:24]!r}") from e
  try:
    if decode:
      images.decode_image(data, where)
  except ValueError as e:
    raise Rejected("bad_picture", str(e)) from e
  return ImagePart(data, **flags)


def decode_base64(text: str) -> bytes:
  """Bytes of base64: with line breaks or not, as a data: URI, url-safe, or without its padding.

  ValueError for any other character, for padding that is not at the end or is too long, and for a
  length that no bytes have.
  """
  text = "".join(text.split())
  if text[:5].lower() == "data:":
    head, comma, text = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
      raise ValueError("a data: URI, but not of base64")
    text = urllib.parse.unquote(text)
  digits = text.rstrip("=").replace("-", "+").replace("_", "/")
  missing = -len(digits) % 4
  if len(text) - len(digits) not in (0, missing):
    raise ValueError("wrong padding")
  return base64.b64decode(digits + "=" * missing, validate=True)


def _flags(part, where, need_loss):
  """The three flags; `need_loss` is its own default."""
  flags = {name: value for name, value in part.items() if name.startswith("need_")}
  for name, value in flags.items():
    # A misspelt flag would silently leave the default in force.
    if name not in _FLAGS:
      raise Rejected("bad_flag", f"{where}: unknown flag {name!r}; known: {', '.join(_FLAGS)}")
    if not isinstance(value, bool):
      raise Rejected("bad_flag", f"{where}: {name} is {value!r:.80}, not true or false")
  return {"need_loss": need_loss, "need_vae": False, "need_vit": False} | flags


def _text_part(content, flags, where):
  if flags["need_vae"] or flags["need_vit"]:
    raise Rejected("bad_flag", f"{where}: a text has need_vae or need_vit")
  if not isinstance(content, str):
    raise Rejected("bad_content", f"{where}: a text's content is {_type(content)}, not a string")
  if not content.strip():
    raise Rejected("empty_text", f"{where}: the text is empty")
  try:
    content.encode("utf-8")
  except UnicodeEncodeError as e:
    raise Rejected("bad_text", f"{where}: lone surrogate at character {e.start}") from e
  return TextPart(content, flags["need_loss"])


def _type(value):
  names = {dict: "an object", list: "a list", str: "a string", type(None): "missing or null"}
  return names.get(type(value), f"a {type(value).__name__}")
