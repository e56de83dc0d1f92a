"""Images on the host: reading, resizing, pixel values, patches (docs/spec.md, section 5)."""

import dataclasses
import io
import math
import re
import struct
import zlib

import einops
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from irg_jax import storage
from irg_jax.config import REQUIRED, setting

# Formats that are opened. Pillow knows more: some start other programs (EPS), some only guess.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd8]")  # with a segment, or the end

# The published transform also limits the area, before the long side. This changes only images
# more stretched than about 7 to 1, and those only by the rounding in between.
_MAX_PIXELS = 14 * 14 * 9 * 1024

# Larger images are refused before they are decoded; this one is 200 MB as 8-bit RGB.
_MAX_READ_PIXELS = 2**26


@dataclasses.dataclass(frozen=True)
class ImageTransform:
  """Resize rule: long side <= max_size, short side >= min_size, both multiples of `stride`.

  The long side wins if a stretched image cannot satisfy both.
  """

  max_size: int = setting(REQUIRED, "longest side of an image, pixels", low=1)
  min_size: int = setting(REQUIRED, "shortest side of an image, pixels", low=1)
  stride: int = setting(REQUIRED, "both sides become multiples of this, pixels", low=1)

  def __post_init__(self):
    if self.stride < 1 or not self.stride <= self.min_size <= self.max_size:
      raise ValueError(f"{self}: needs 1 <= stride <= min_size <= max_size")
    if self.max_size % self.stride or self.min_size % self.stride:
      raise ValueError(f"{self}: max_size and min_size must be multiples of the stride")

  def size(self, width: int, height: int) -> tuple[int, int]:
    """Width and height after the transform.

    Images are enlarged only to reach `min_size`. Each step rounds to whole pixels and then to
    multiples of the stride (half to even both times, at least one stride). The next step starts
    from the rounded sides, so the order of the steps matters for stretched images.

    Worked examples, with max 1024, min 512, stride 16:
      640 x 480: the short side grows to 512, the long one to 683, rounded to 688.
      1999 x 201: the short side grows to 512, which gives 5088 x 512; the limit of the area gives
        3520 x 352, and the limit of the long side 1024 x 96.

    Raises ValueError if a side is below 1.
    """
    if width < 1 or height < 1:
      raise ValueError(f"an image of {width} x {height} pixels cannot be resized")
    scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
    size = self._scaled(width, height, scale)
    if (area := math.prod(size)) > _MAX_PIXELS:
      # The factor is not square-rooted: the published models saw images made this way.
      size = self._scaled(*size, _MAX_PIXELS / area)
    if max(size) > self.max_size:
      size = self._scaled(*size, self.max_size / max(size))
    return size

  def __call__(self, image: np.ndarray) -> np.ndarray:
    """Resizes an image, uint8 [H, W, 3]."""
    return resize_to(image, *self.size(image.shape[1], image.shape[0]))

  def _scaled(self, width, height, scale):
    snap = lambda side: max(self.stride, round(round(side * scale) / self.stride) * self.stride)
    return snap(width), snap(height)


# At inference (docs/spec.md, sections 5 and 7). IRG trains with a ViT minimum of 378.
VAE_TRANSFORM = ImageTransform(max_size=1024, min_size=512, stride=16)
VIT_TRANSFORM = ImageTransform(max_size=980, min_size=224, stride=14)
VIT_TRAIN_TRANSFORM = ImageTransform(max_size=980, min_size=378, stride=14)


def resize_to(image: np.ndarray, width: int, height: int) -> np.ndarray:
  """Bicubic resize with antialias, uint8 [H, W, 3] -> uint8 [height, width, 3].

  Pillow's 8-bit arithmetic rounds between its two passes. The models were trained on it; a
  float resize differs by a level in places.
  """
  if image.shape[:2] == (height, width):
    return image
  return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def to_pixels(image: np.ndarray) -> np.ndarray:
  """8-bit levels -> float32 in [-1, 1], same shape."""
  return (image.astype(np.float32) / 255 - 0.5) / 0.5


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
  """Pixels [H, W, C] -> patches [P, patch * patch * C], flattened as (row, column, channel).

  Raises ValueError if a side is not a multiple of `patch`.
  """
  height, width, _ = pixels.shape
  if height % patch or width % patch:
    raise ValueError(f"an image of {width} x {height} pixels does not divide into patches "
                     f"of {patch}")
  return einops.rearrange(pixels, "(y p) (x q) c -> (y x) (p q c)", p=patch, q=patch)


def position_ids(rows: int, columns: int, grid: int) -> np.ndarray:
  """Indices of a rows x columns block in a grid x grid table, int32 [rows * columns].

  The index is `row * grid + column`: 2 x 3 in a grid of 8 is [0, 1, 2, 8, 9, 10].
  Raises ValueError if the block is larger than the table.
  """
  if rows > grid or columns > grid:
    raise ValueError(f"an image of {columns} x {rows} patches exceeds the {grid} x {grid} "
                     "positions of the model; make it smaller")
  return np.arange(grid * grid, dtype=np.int32).reshape(grid, grid)[:rows, :columns].ravel()


def read_image(path) -> np.ndarray:
  """Reads an image file, see `decode_image`; errors name the file."""
  try:
    data = storage.read_file(path)
  except OSError as e:
    raise ValueError(f"{path}: cannot read the image: {e.strerror or e}") from e
  return decode_image(data, str(path))


def encode_image(image, format: str = "PNG", **options) -> bytes:
  """An RGB image, uint8 [H, W, 3] or Pillow's, as a file; `options` as of Pillow's `save`."""
  file = io.BytesIO()
  Image.fromarray(np.asarray(image, np.uint8)).save(file, format, **options)
  return file.getvalue()


def open_image(data: bytes) -> Image.Image:
  """Pillow's image of a file's content, in one of `FORMATS`; not decoded yet."""
  return Image.open(io.BytesIO(data), formats=FORMATS)


def load_whole(image: Image.Image, data: bytes) -> None:
  """Decodes an image of `open_image`; ValueError if rows are missing, which Pillow fills in."""
  width, height = image.size
  strips = [tile.extents for tile in image.tile] if image.format == "TIFF" else []
  image.load()
  last = image.crop((0, height - 1, width, height))
  if (strips and sum((x - left) * (y - top) for left, top, x, y in strips) < width * height
      or image.format == "PNG" and (image.info.get("interlace") or not np.asarray(last).any())
      and _png_lacks_rows(data)
      or image.format in ("JPEG", "MPO") and _jpeg_lacks_data(image, data)):
    raise ValueError(f"truncated: fewer than its {height} rows are there")
  _check_levels(image, data)


def decode_image(data: bytes, name: str) -> np.ndarray:
  """Decodes an image to RGB, uint8 [H, W, 3].

  EXIF orientation is applied, transparency becomes white, and only the first frame of an animation
  is used. 16-bit grey is reduced to 8 bits, and floating-point grey from 0 to 1 spread over them.

  Args:
    data: content of the file, in one of `FORMATS`.
    name: of the image in errors, ValueError: not an image, truncated, above 67 million pixels, or
      grey of another range, whose white is not known.
  """
  try:
    with open_image(data) as image:
      if image.width * image.height > _MAX_READ_PIXELS:
        raise Image.DecompressionBombError
      load_whole(image, data)
      return np.array(to_rgb(image))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise ValueError(f"{name}: more than {_MAX_READ_PIXELS:,} pixels; make the image smaller "
                     "first") from e
  except Exception as e:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
    unknown = isinstance(e, UnidentifiedImageError)
    fault = f"unknown format, none of {', '.join(FORMATS)}" if unknown else e
    raise ValueError(f"{name}: not an image that can be decoded: {fault}") from e


def to_rgb(image: Image.Image) -> Image.Image:
  """A decoded image of `open_image` as RGB, see `decode_image`; ValueError for grey of no range."""
  turned = ImageOps.exif_transpose(image)
  if image.mode[0] in "IF":
    return Image.fromarray(_grey_levels(np.asarray(turned), image)).convert("RGB")
  if not turned.has_transparency_data:
    return turned.convert("RGB")
  turned = turned.convert("RGBA")
  white = Image.new("RGB", turned.size, (255, 255, 255))
  white.paste(turned, mask=turned.getchannel("A"))
  return white


def _grey_levels(grey, source):
  """8-bit levels of 16-bit, 32-bit or floating-point grey; `source` is the opened image."""
  low, high, again = grey.min(), grey.max(), "save it with 8 bits"
  if getattr(source, "tag_v2", {}).get(262) == 0:
    raise ValueError(f"grey of more than 8 bits whose 0 is white; {again}")
  if source.mode == "F":
    if not 0 <= low <= high <= 1:
      raise ValueError(f"floating-point grey from {low:.4g} to {high:.4g}, not 0 to 1; {again}")
    return np.rint(grey * 255).astype(np.uint8)
  if source.mode == "I" and source.format != "PPM":  # Pillow brings those to 16 bits
    raise ValueError(f"signed or 32-bit grey from {low} to {high}, whose white is not known; "
                     f"{again}")
  if 0 < high < 2**12:
    raise ValueError(f"16-bit grey that ends at {high} of 65535, all but black; scale it, or "
                     f"{again}")
  return (grey >> 8).astype(np.uint8)


def _check_levels(image, data):
  """Raises ValueError for colour whose levels Pillow would bring to 8 bits wrongly."""
  tags = getattr(image, "tag_v2", {})
  if 2 in np.atleast_1d(tags.get(339, 1)) and image.mode[0] != "I":
    raise ValueError("signed levels of 8 bits; save it with unsigned ones")
  deep = data[24] == 16 if image.format == "PNG" else 16 in np.atleast_1d(tags.get(258, 8))
  if deep and image.mode in ("LA", "RGB", "RGBA"):
    bands = image.getextrema()[:1 if image.mode == "LA" else 3]
    if 0 < (high := max(band[1] for band in bands)) < 2**4:
      raise ValueError(f"16-bit colour that ends at {high << 8} of 65535, all but black; scale it, "
                       "or save it with 8 bits")


def _jpeg_lacks_data(image, data):
  """Whether the pixels of a JPEG file end before its end marker, which libjpeg fills with grey.

  Bits after the last pixel are not read. So a complete file with more bits before its end marker
  gives the same image. Only files that may have been filled are decoded again.
  """
  end, scans, complete = _jpeg_scans(data)
  corner = np.atleast_1d(image.getpixel((image.width - 1, image.height - 1)))
  blended = 1 in (image.width % 16, image.height % 16)  # the corner's colour with that of others
  if not complete or end == 0 or scans == 1 and not blended and (abs(corner - 127.5) > 1).any():
    return not complete
  more = b"".join(bytes([0xA5, 0x5A, 0x3C, 0xC3] * 8 + [0xFF, 0xD0 + i % 8]) for i in range(16))
  return open_image(data[:end].rstrip(b"\xff") + more + data[end:]).tobytes() != image.tobytes()


def _jpeg_scans(data):
  """(place of the end marker, number of scans, whether these and the marker are all there).

  The scans are to hold every bit of every coefficient. The place is 0 for a process without
  Huffman's codes.
  """
  at, scans, left = 2, 0, {}  # left: bits that are still to come, by component and coefficient
  while (found := _JPEG_MARKER.search(data, at)) and (marker := found[0][1]) != 0xD9:
    at = found.end() + int.from_bytes(data[found.end():found.end() + 2])
    body = data[found.end() + 2:at]
    if 0xC0 <= marker <= 0xC2:
      left = {component: [15] * 64 for component in body[6::3]}
    elif marker == 0xDA:
      scans += 1
      for component in body[1:-3:2]:
        left.setdefault(component, [0] * 64)[body[-3]:body[-2] + 1] = (
            [body[-1] & 15] * (body[-2] + 1 - body[-3]))
    elif 0xC0 < marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):
      return 0, scans, True
  return found.start() if found else -1, scans, bool(found) and not any(map(any, left.values()))


def _png_lacks_rows(data):
  """Whether the pixels of a PNG file end before its last row, counted without keeping them."""
  width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
  bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
  left, stream, at = 0, zlib.decompressobj(), 8
  # Interlaced, the rows of seven passes: (first column, first row, steps of both).
  for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4),
                       (1, 0, 2, 2), (0, 1, 1, 2)) if interlaced else ((0, 0, 1, 1),):
    if (columns := -((x - width) // dx)) > 0:
      left -= ((y - height) // dy) * (1 + -(-columns * bits // 8))
  while left > 0 and at + 8 <= len(data):
    length, name = struct.unpack(">I4s", data[at:at + 8])
    part, at = data[at + 8:at + 8 + length] if name == b"IDAT" else b"", at + 12 + length
    while part and left > 0:
      left, part = left - len(stream.decompress(part, 2**20)), stream.unconsumed_tail
  return left > 0
