"""Looks through IRGL data before anything is built or trained on it: `irg data check`."""

import collections
import dataclasses
import io

import numpy as np
from PIL import Image

from irg_jax import images
from irg_jax.data import array_records, check_page, parquet, sources
from irg_jax.data.records import MODES, Record, TextPart
from irg_jax.storage import write_text

# What a sample's length is made of, as the model counts it (spec sections 2 and 3).
KINDS = ("text", "latent", "ViT", "total")

_LISTED = 1000  # unusable rows that the page shows of a mode
_LATENT_PIXELS = 16
_VIT_PIXELS = 14


@dataclasses.dataclass(frozen=True, eq=False)
class ModeReport:
  """What a mode holds.

  Attributes:
    metadata: rows, rejected and offenders, as in `parquet.Tally`.
    lengths: tokens of each usable sample by kind (`KINDS`), int64 [samples].
    samples: a few records from all over the mode.
  """

  mode: str
  metadata: dict
  lengths: dict[str, np.ndarray]
  samples: list[Record]


def check(path, modes=MODES, *, count_text=None, samples: int = 3, workers: int | None = None,
          progress=None) -> list[ModeReport]:
  """Reads every row of the modes, in either form of `sources.open_source`.

  Args:
    path: the folder of the data.
    count_text: text -> number of its tokens without framing. Default: its UTF-8 bytes.
    samples: how many records a report keeps.
    workers, progress: see `parquet.read_good`.

  Raises:
    ValueError: a mode is missing, or a file is damaged.
  """
  count_text = count_text or (lambda text: len(text.encode("utf-8")))
  options = dict(count_text=count_text, samples=samples, workers=workers, progress=progress)
  return [_check_mode(path, mode, **options) for mode in modes]


def sample_lengths(record: Record, count_text) -> dict[str, int]:
  """Tokens of a sample by kind, framing included; nothing is dropped from the conditions."""
  lengths = dict.fromkeys(KINDS, 0)
  for part in record.parts:
    if isinstance(part, TextPart):
      lengths["text"] += count_text(part.text) + 2
      continue
    for kind, times, transform, pixels in (
        ("latent", part.need_loss + part.need_vae, images.VAE_TRANSFORM, _LATENT_PIXELS),
        ("ViT", part.need_vit, images.VIT_TRAIN_TRANSFORM, _VIT_PIXELS)):
      width, height = transform.size(*_size(part))
      lengths[kind] += times * (width * height // pixels**2)
      lengths["text"] += times * 2  # the start and end of an image are tokens like a text's
  lengths["total"] = sum(lengths.values())
  return lengths


def write_page(out, path, reports: list[ModeReport], unit: str) -> None:
  """Writes the reports as one self-contained HTML file, which appears whole or not at all.

  Args:
    out: the file.
    path: the data, for the title.
    reports: from `check`.
    unit: what a text was counted in, "tokens" or "bytes".
  """
  write_text(out, check_page.check_html(str(path), reports, unit))


def _check_mode(path, mode, *, count_text, samples, workers, progress):
  records, metadata = _open(path, mode, workers, progress)
  lengths, kept, step = collections.defaultdict(list), [], 1
  for number, record in enumerate(records):
    for kind, length in sample_lengths(record, count_text).items():
      lengths[kind].append(length)
    if number % step == 0:
      kept.append(record)
    if len(kept) == 2 * samples:  # how many will come is not known: keep every second from now on
      kept, step = kept[::2], 2 * step
  lengths = {kind: np.array(lengths[kind], np.int64) for kind in KINDS}
  shown = np.linspace(0, len(kept) - 1, min(samples, len(kept))).round().astype(int)
  return ModeReport(mode, metadata, lengths, [kept[i] for i in shown])


def _open(path, mode, workers, progress):
  """An iterator of the usable records, and metadata that is complete when it has ended."""
  if array_records.mode_folder(path, mode).parent.is_dir():
    source = sources.open_source(path, mode)
    return _read_all(source, progress), source.metadata
  files = parquet.mode_files(path, mode)
  tally = parquet.Tally(mode, parquet.count_rows(files), 1.0, listed=_LISTED)
  good = parquet.read_good(files, tally, workers=workers, progress=progress)
  return (record for _, record in good), tally.metadata


def _read_all(source, progress):
  for i in range(len(source)):
    if progress:
      progress(f"reading {source.mode}", 0, i + 1, len(source))
    yield source[i]


def _size(part):
  """Width and height from the head of the file, perhaps swapped: the number of tokens is not."""
  with Image.open(io.BytesIO(part.data)) as image:
    return image.size
