"""Pictures as a judge is sent them: the file as it is, or a cell of a grid."""

import base64
import dataclasses
import functools
import hashlib
import io
import pathlib

from PIL import Image

_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class Unusable(ValueError):
  """There is no such image, or it cannot be decoded."""


@dataclasses.dataclass(frozen=True)
class Cell:
  """Number `index`, row by row, of the cells of the grid in the image at `path`."""

  path: pathlib.Path
  columns: int
  rows: int
  index: int


@dataclasses.dataclass(frozen=True)
class Encoded:
  """An image to send. Attributes: `digest` of its bytes; `url`, a data URL."""

  data: bytes
  type: str

  @functools.cached_property
  def digest(self) -> str:
    return hashlib.sha256(self.data).hexdigest()

  @property
  def url(self) -> str:
    return f"data:{self.type};base64,{base64.b64encode(self.data).decode()}"


def encode(image) -> Encoded:
  """The bytes to send of a path or a Cell.

  A cell becomes a JPEG of Pillow's default quality, as the official OneIG scripts have it. A file
  of a type that endpoints take is sent as it is.

  Raises:
    Unusable: names the file.
  """
  cell = isinstance(image, Cell)
  path = image.path if cell else pathlib.Path(image)
  try:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
      opened.load()  # a file that was cut short must not be judged
      if not cell and opened.format in _TYPES:
        return Encoded(data, _TYPES[opened.format])
      opened = opened.convert("RGB")
  except FileNotFoundError:
    raise Unusable(f"{path} is missing") from None
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise Unusable(f"{path} cannot be read ({e})") from e
  if cell:
    opened = opened.crop(_box(opened.size, image))
  out = io.BytesIO()
  opened.save(out, format="JPEG" if cell else "PNG")
  return Encoded(out.getvalue(), "image/jpeg" if cell else "image/png")


def cells(path, columns: int = 2, rows: int = 2) -> list[Cell]:
  """The cells of a grid, without those that are wholly black: the images that failed.

  Of a grid that cannot be read, all cells: asking about them reports why.
  """
  every = [Cell(pathlib.Path(path), columns, rows, i) for i in range(columns * rows)]
  try:
    with Image.open(path) as opened:
      opened = opened.convert("RGB")
      return [c for c in every if opened.crop(_box(opened.size, c)).getbbox()]
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
    return every


def _box(size, cell):
  """Left, top, right, bottom. Pixels that are over at the right and below belong to no cell."""
  width, height = size[0] // cell.columns, size[1] // cell.rows
  left, top = cell.index % cell.columns * width, cell.index // cell.columns * height
  return left, top, left + width, top + height
