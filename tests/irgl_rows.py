"""Rows of IRGL for tests: conversations that are good, or bad in one way each."""

import base64
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MODE = "improving_full_learning"


def image(kind="PNG", seed=0, size=(24, 20)) -> bytes:
  """An encoded image of noise."""
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()


def encoded(data: bytes) -> str:
  return base64.b64encode(data).decode()


def text(content="a thought", **flags) -> dict:
  return {"type": "text", "content": content, **flags}


def image_part(data: bytes = image(), **flags) -> dict:
  return {"type": "image", "content": encoded(data), **flags}


def turns(*parts, prompt="a fox") -> list:
  return [{"role": "user", "content": prompt}, {"role": "assistant", "content": list(parts)}]


def good(number: int) -> list:
  """A conversation of all kinds of parts, different for each number."""
  data = image(("PNG", "JPEG", "WEBP")[number % 3], seed=number)
  return turns(text(f"thought {number}", need_loss=False),
               image_part(data, need_vae=True, need_vit=True), text("ü" * (1 + number)),
               image_part(image(seed=100 + number), need_loss=True), prompt=f"prompt {number}")


_HALF = image()[: len(image()) // 2]
_TARGET = image_part(need_loss=True)

# name -> (row, the reason it must be rejected for, part of the detail)
BAD = {
    "null": (None, "bad_json", "None"),
    "broken JSON": ("[{", "bad_json", "line 1"),
    "deep JSON": ("[" * 100_000, "bad_json", "recursion"),
    "not UTF-8": (b'[{"role": "user", "content": "\xff"}]', "bad_json", "utf-8"),
    "no list": ({"role": "user", "content": "x"}, "bad_json", "an object"),
    "no turns": ([], "no_assistant", "no turns"),
    "user only": ([{"role": "user", "content": "x", "need_loss": True}], "no_assistant",
                  "no turn of the assistant"),
    "turn is a string": (["x"], "bad_turn", "turn 0"),
    "turn without content": ([{"role": "user"}], "bad_turn", "turn 0"),
    "role": ([{"role": "tool", "content": []}], "unknown_role", "'tool'"),
    "role of a wrong type": ([{"role": ["user"], "content": "x"}], "unknown_role", "turn 0"),
    "user content": ([{"role": "user", "content": {"text": "x"}}], "bad_content",
                     "an object, not a string or list of parts"),
    "flags beside a user's parts": (
        [{"role": "user", "content": [text()], "need_loss": True}, *turns(_TARGET)], "bad_flag",
        "turn 0: flags of a list"),
    "unused picture of a user": ([{"role": "user", "content": [image_part()]}, *turns(_TARGET)],
                                 "unused_picture", "turn 0, part 0"),
    "assistant content": ([{"role": "assistant", "content": "x"}], "bad_content", "a string"),
    "part type": (turns(_TARGET, {"type": "video", "content": "x"}), "unknown_part", "'video'"),
    "part without type": (turns(_TARGET, {"content": "x"}), "unknown_part", "turn 1, part 1"),
    "part is a string": (turns(_TARGET, "x"), "unknown_part", "'x'"),
    "text without content": (turns(_TARGET, {"type": "text"}), "bad_content", "missing"),
    "text is a number": (turns(_TARGET, text(5)), "bad_content", "int"),
    "empty text": (turns(_TARGET, text("")), "empty_text", "turn 1, part 1"),
    "blank text": (turns(_TARGET, text(" \n")), "empty_text", "turn 1, part 1"),
    "empty prompt": (turns(_TARGET, prompt=""), "empty_text", "turn 0"),
    "lone surrogate": (turns(_TARGET, text("ab\ud800")), "bad_text", "character 2"),
    "flag is a number": (turns(image_part(need_loss=1)), "bad_flag", "need_loss is 1"),
    "flag is a string": (turns(text(need_loss="true")), "bad_flag", "'true'"),
    "flag is null": (turns(_TARGET, text(need_loss=None)), "bad_flag", "None"),
    "flag of a user": ([{"role": "user", "content": "x", "need_loss": 0}, *turns(_TARGET)],
                       "bad_flag", "turn 0"),
    "misspelt flag": (turns(image_part(need_loss=True, need_vitt=True)), "bad_flag", "need_vitt"),
    "text for the VAE": (turns(_TARGET, text(need_vae=True)), "bad_flag", "a text"),
    "picture without content": (turns({"type": "image", "need_loss": True}), "bad_content",
                                "missing"),
    "picture without use": (turns(text(), image_part()), "unused_picture", "turn 1, part 1"),
    "no base64": (turns(image_part(need_loss=True) | {"content": "@@@"}), "bad_base64", "part 0"),
    "base64 of a wrong length": (turns(image_part(need_loss=True) | {"content": "abcde"}),
                                 "bad_base64", "part 0"),
    "empty picture": (turns(image_part(b"", need_loss=True)), "bad_picture", "unknown format"),
    "no picture": (turns(image_part(b"hello", need_loss=True)), "bad_picture", "unknown format"),
    "truncated picture": (turns(image_part(_HALF, need_loss=True)), "bad_picture", "part 0"),
    "nothing to learn": (turns(text(need_loss=False), image_part(need_vit=True)), "no_target",
                         "need_loss"),
    "assistant without parts": (turns(), "no_target", "need_loss"),
}


def as_row(value):
  """The row as it stands in the parquet file."""
  return value if value is None or isinstance(value, (str, bytes)) else json.dumps(value)


def write_mode(root, rows, mode=MODE, name="part-0.parquet", *, group=3, column="conversation"):
  """Writes rows as a file of a mode; rows of bytes that are not UTF-8 are allowed."""
  folder = root / mode
  folder.mkdir(parents=True, exist_ok=True)
  data = [r.encode() if isinstance(r := as_row(row), str) else r for row in rows]
  # Viewed as strings, unchecked: that is how a careless writer makes bad files.
  strings = pa.array(data, pa.binary()).view(pa.string())
  pq.write_table(pa.table({column: strings}), folder / name, row_group_size=group)
  return folder / name
