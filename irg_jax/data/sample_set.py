"""Sample set: a small dataset in IRGL's published form (docs/spec.md, section 5), made by code.

Every mode has `ROWS` usable rows and one row that is unusable, for another reason in each mode.
It is enough to run every command on a laptop, and too small to learn anything from.
"""

import json

from PIL import Image, ImageDraw

from irg_jax import leases
from irg_jax.data import parquet
from irg_jax.data.records import MODES, assistant, image_part, text_part, user
from irg_jax.images import encode_image

NAME = "sample"  # the value of data.path that stands for this set
ROWS = 12
MAX_REJECTED = 0.1  # the share of unusable rows, 1 / 13, is below it

_SYSTEM_PROMPT = "Think before you paint. Put each thought between <think> and </think>."
_COLORS = {"red": "#c8342c", "green": "#3c8c40", "blue": "#2c5cb8", "yellow": "#e8c030",
           "black": "#202024"}
_SHAPES = ("circle", "square", "triangle", "diamond")
_SIZES = ((64, 64), (96, 64), (64, 96))  # width, height
_PAPER = "#f4f0e8"


def write(folder) -> None:
  """Writes `folder`/MODE/00000.parquet for all six modes; the same files each time.

  Raises:
    FileExistsError: `folder` exists and is not empty.
  """
  with leases.new_folder(folder) as partial:
    for mode, spoil in _UNUSABLE.items():
      *good, last = (conversation(mode, number) for number in range(ROWS + 1))
      parquet.write(partial, [(mode, row) for row in (*good, spoil(last))])


def conversation(mode: str, number: int) -> list:
  """Row `number` of a mode: two shapes, painted wrongly first where the mode improves an image."""
  scene = _scene(number)
  first, second, color = scene["first"], scene["second"], scene["second_color"]
  where = "above" if scene["size"][1] > scene["size"][0] else "left of"
  prompt = f"a {scene['first_color']} {first} {where} a {color} {second}"
  plan = (f"<think>Two flat shapes on a pale ground: {prompt}. Both are large and nothing "
          "overlaps.</think>")
  thought, reflection = text_part(plan), text_part(
      f"<think>The {second} is {scene['wrong_color']}, but the request says {color}. The "
      f"colour is what tells the shapes apart, so it matters most.\n1. Keep the {first} and both "
      f"places.\n2. Paint the {second} {color}.\nFinal prompt: {prompt}, flat and large, on a "
      "pale ground.</think>")
  right, wrong = _paint(scene), _paint(scene | {"second_color": scene["wrong_color"]})
  first_round = [text_part(plan, False), image_part(wrong, need_vae=True, need_vit=True)]
  target = image_part(right, need_loss=True)
  parts = dict(zip(MODES, (
      [image_part(right, need_vit=True), thought],
      [thought],
      [thought, target],
      [image_part(wrong, need_vit=True), image_part(right, need_vit=True), reflection],
      [*first_round, reflection],
      [*first_round, reflection, target])))
  return [user(_SYSTEM_PROMPT), user(prompt), assistant(parts[mode])]


def _scene(number):
  colors = list(_COLORS)
  first, second = number % 5, (2 * number + 1) % 5
  second = (second + (first == second)) % 5
  return {"size": _SIZES[number % 3], "first": _SHAPES[number % 4],
          "second": _SHAPES[(number // 4 + 1) % 4], "first_color": colors[first],
          "second_color": colors[second], "wrong_color": colors[(second + 2) % 5]}


def _paint(scene):
  """The scene as PNG bytes: the two shapes side by side, or one above the other."""
  width, height = scene["size"]
  image = Image.new("RGB", (width, height), _PAPER)
  draw = ImageDraw.Draw(image)
  radius = min(width, height, max(width, height) // 2) // 2 - 3
  centers = (((width // 2, height // 4), (width // 2, 3 * height // 4)) if height > width else
             ((width // 4, height // 2), (3 * width // 4, height // 2)))
  for (x, y), which in zip(centers, ("first", "second")):
    shape, color = scene[which], _COLORS[scene[f"{which}_color"]]
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
      draw.ellipse((left, top, right, bottom), color)
    else:
      draw.polygon({"square": [(left, top), (right, top), (right, bottom), (left, bottom)],
                    "triangle": [(x, top), (right, bottom), (left, bottom)],
                    "diamond": [(x, top), (right, y), (x, bottom), (left, y)]}[shape], color)
  return encode_image(image)


def _with_part(row, number, **changes):
  """The row with changed fields in a part of the assistant."""
  *before, turn = row
  parts = list(turn["content"])
  parts[number] = parts[number] | changes
  return [*before, turn | {"content": parts}]


# Mode -> function that makes one of its rows unusable.
_UNUSABLE = dict(zip(MODES, (
    lambda row: json.dumps(row)[:-20],  # bad_json
    lambda row: _with_part(row, 0, content=" "),  # empty_text
    lambda row: _with_part(row, 1, content=row[-1]["content"][1]["content"][:80]),  # bad_picture
    lambda row: _with_part(row, 0, need_vit=False),  # unused_picture
    lambda row: [*row[:1], {"role": "tool", "content": "x"}, *row[1:]],  # unknown_role
    lambda row: _with_part(row, 3, content="@"),  # bad_base64
)))
