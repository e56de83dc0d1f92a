"""Report on IRGL data before anything is built or trained on it: `irg data check`."""

import collections
import dataclasses

import numpy as np
from PIL import Image

from irg_jax import images
from irg_jax.data import parquet, sources
from irg_jax.data.records import MODES, Record, TextPart
from irg_jax.reports import pages
from irg_jax.storage import write_text

# Parts of a sample's length, in tokens of the model (docs/spec.md, sections 2 and 3).
KINDS = ("text", "latent", "ViT", "total")

_LISTED = 1000  # unusable rows of a mode on the page


@dataclasses.dataclass(frozen=True, eq=False)
class ModeReport:
  """Content of a mode."""

  mode: str
  metadata: dict  # as of `parquet.Tally`
  lengths: dict[str, np.ndarray]  # tokens of each usable sample by kind (`KINDS`), int64 [samples]
  samples: list[Record]  # a few from all over the mode

  @property
  def rejected(self) -> int:
    """Number of unusable rows."""
    return sum(self.metadata["rejected"].values())


def check(path, modes=MODES, *, count_text=None, samples: int = 3, workers: int | None = None,
          progress=None) -> list[ModeReport]:
  """Reads every row of the modes, in either form of `sources.open_source`.

  Args:
    count_text: text -> number of its tokens without framing. Default: its UTF-8 bytes.
    samples: number of records that a report keeps.
    workers, progress: see `parquet.read_good`.

  Raises:
    ValueError: a mode is missing, or a file is damaged.
  """
  count_text = count_text or (lambda text: len(text.encode("utf-8")))
  return [_check_mode(path, mode, count_text, samples, workers, progress) for mode in modes]


def sample_lengths(record: Record, count_text) -> dict[str, int]:
  """Tokens of a sample by kind, framing included, without conditioning dropout."""
  lengths = dict.fromkeys(KINDS, 0)
  for part in record.parts:
    if isinstance(part, TextPart):
      lengths["text"] += count_text(part.text) + 2
      continue
    with images.open_image(part.data) as image:
      size = image.size  # from the file's header; EXIF may swap the sides, which changes no count
    for kind, times, transform, pixels in (
        ("latent", part.need_loss + part.need_vae, images.VAE_TRANSFORM, 16),
        ("ViT", part.need_vit, images.VIT_TRAIN_TRANSFORM, 14)):
      width, height = transform.size(*size)
      lengths[kind] += times * (width * height // pixels**2)
      lengths["text"] += times * 2  # start and end of an image are text tokens
  lengths["total"] = sum(lengths.values())
  return lengths


def write_page(out, path, reports: list[ModeReport], unit: str) -> None:
  """Writes the reports on the data in `path` as one self-contained HTML file.

  `unit` of the lengths of texts is "tokens" or "bytes".
  """
  rows = sum(report.metadata["rows"] for report in reports)
  write_text(out, pages.render(
      "data_check", title=str(path), unit=unit, rows=rows,
      usable=rows - sum(report.rejected for report in reports),
      overview=[_counts(report) for report in reports], modes=map(_section, reports)))


def _check_mode(path, mode, count_text, samples, workers, progress):
  if sources.mode_folder(path, mode).parent.is_dir():
    source = sources.open_source(path, mode)
    records, metadata = _read_all(source, progress), source.metadata
  else:
    tally = parquet.Tally(path, mode, 1.0, listed=_LISTED)
    good = parquet.read_good(tally, workers=workers, progress=progress)
    records, metadata = (record for _, record in good), tally.metadata  # complete at the end
  lengths, kept, step = collections.defaultdict(list), [], 1
  for number, record in enumerate(records):
    for kind, length in sample_lengths(record, count_text).items():
      lengths[kind].append(length)
    if number % step == 0:
      kept.append(record)
    if len(kept) == 2 * samples:  # their number is not known: keep every second from now on
      kept, step = kept[::2], 2 * step
  lengths = {kind: np.array(lengths[kind], np.int64) for kind in KINDS}
  shown = np.linspace(0, len(kept) - 1, min(samples, len(kept))).round().astype(int)
  return ModeReport(mode, metadata, lengths, [kept[i] for i in shown])


def _read_all(source, progress):
  for i in range(len(source)):
    if progress:
      progress(f"reading {source.mode}", 0, i + 1, len(source))
    yield source[i]


def _counts(report):
  total, reasons = report.metadata["rows"], sorted(report.metadata["rejected"].items())
  return (report.mode, total, total - report.rejected, report.rejected,
          ", ".join(f"{count:,} {reason}" for reason, count in reasons))


def _section(report):
  """Values of a mode for the page."""
  offenders, lengths, histogram, rows = report.metadata["offenders"], report.lengths, None, []
  if len(total := lengths["total"]):
    rows = [(kind, *np.percentile(x, (0, 50, 95, 100)), x.sum()) for kind, x in lengths.items()]
    histogram = np.histogram(total, bins=40, range=(0, max(int(total.max()), 1)))
  return {"name": report.mode, "lengths": rows, "histogram": histogram, "offenders": offenders,
          "complete": report.rejected == len(offenders),
          "samples": [{"row": record.index, "parts": [_part(part) for part in record.parts]}
                      for record in report.samples]}


def _part(part):
  """Values of a part for the page."""
  flags = {"need_loss": "learnt", "need_vae": "VAE", "need_vit": "ViT"}
  marks = [name for flag, name in flags.items() if getattr(part, flag, False)]
  if isinstance(part, TextPart):
    return {"text": part.text, "marks": marks}
  image = Image.fromarray(images.decode_image(part.data, "a sample's image"))
  width, height = image.size
  image.thumbnail((384, 384))
  return {"jpeg": images.encode_image(image, "JPEG", quality=88), "width": width,
          "height": height, "marks": marks}
