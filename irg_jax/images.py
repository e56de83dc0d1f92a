"""Images on the host: reading, resizing, pixel values, patches (docs/spec.md, section 5)."""

import dataclasses
import io
import math
import pathlib

import einops
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from irg_jax.config import REQUIRED, setting

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
    data = pathlib.Path(path).read_bytes()
  except OSError as e:
    raise ValueError(f"{path}: cannot read the image: {e.strerror or e}") from e
  return decode_image(data, str(path))


def encode_image(image, format: str = "PNG", **options) -> bytes:
  """An RGB image, uint8 [H, W, 3] or Pillow's, as a file; `options` as of Pillow's `save`."""
  file = io.BytesIO()
  Image.fromarray(np.asarray(image, np.uint8)).save(file, format, **options)
  return file.getvalue()


def decode_image(data: bytes, name: str) -> np.ndarray:
  """Decodes an image to RGB, uint8 [H, W, 3].

  EXIF orientation is applied, transparency becomes white, 16-bit grey is reduced to 8 bits, and
  only the first frame of an animation is used.

  Args:
    data: content of the file, in any format that Pillow reads.
    name: of the image in errors, ValueError: not an image, truncated, or above 67 million pixels.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.width * image.height > _MAX_READ_PIXELS:
        raise Image.DecompressionBombError
      return np.array(_to_rgb(ImageOps.exif_transpose(image)))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise ValueError(f"{name}: more than {_MAX_READ_PIXELS:,} pixels; make the image smaller "
                     "first") from e
  except Exception as e:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
    fault = "unknown format" if isinstance(e, UnidentifiedImageError) else e
    raise ValueError(f"{name}: not an image that can be decoded: {fault}") from e


def _to_rgb(image):
  if image.mode.startswith("I"):  # 16-bit grey, or 32-bit holding it: Pillow would clip it
    image = Image.fromarray((np.clip(image, 0, 2**16 - 1) >> 8).astype(np.uint8))
  if not image.has_transparency_data:
    return image.convert("RGB")
  image = image.convert("RGBA")
  white = Image.new("RGB", image.size, (255, 255, 255))
  white.paste(image, mask=image.getchannel("A"))
  return white
