"""The page of `irg data check`: counts, rejected rows, lengths, and a few samples to look at."""

import base64
import io

import numpy as np
from PIL import Image

from irg_jax import images
from irg_jax.data.records import TextPart
from irg_jax.reports.pages import escape, page, short

_BINS = 40
_THUMBNAIL = 384  # pixels

_CSS = """
main > section { margin-top: 4rem; border-top: 1px solid var(--line); padding-top: 1.6rem; }
section > h2 { font-size: 1.05rem; overflow-wrap: anywhere; }
.data { margin-top: 1.1rem; font: 13.5px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; color: var(--soft); }
.data td:last-child { white-space: normal; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; margin-top: 1.4rem; }
svg rect { fill: var(--accent); } svg line { stroke: var(--line); }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.samples { display: grid; gap: 1rem 2rem; margin: 1.6rem 0 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.samples > li { background: var(--card); border-radius: 6px; padding: 1rem 1.1rem; }
.samples p { font-size: 15px; line-height: 1.5; margin-top: .6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 14rem; overflow: auto; }
.samples img { width: auto; max-width: 100%; }
.samples .tag { white-space: nowrap; margin-right: .3em; }
"""


def check_html(title: str, reports, unit: str) -> str:
  """The page; see `check.write_page`."""
  rejected = sum(sum(r.metadata["rejected"].values()) for r in reports)
  rows = sum(r.metadata["rows"] for r in reports)
  body = (
      f'<main class="wide"><p class="label">IRGL data</p><h1>{escape(title)}</h1>'
      f'<p class="meta">{rows - rejected:,} of {rows:,} rows can be used, {rejected:,} '
      f"cannot. Lengths are in tokens{_unit_note(unit)}.</p>"
      f"{_overview(reports)}{''.join(map(_section, reports))}</main>")
  return page(f"{title}: IRGL data", body, _CSS)


def _overview(reports):
  """Counts by mode and reason."""
  rows = []
  for r in reports:
    total, by_reason = r.metadata["rows"], r.metadata["rejected"]
    rejected = sum(by_reason.values())
    why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(by_reason.items()))
    rows.append([r.mode, f"{total:,}", f"{total - rejected:,}", f"{rejected:,}", why])
  return _table(["mode", "rows", "usable", "rejected", "by reason"], rows)


def _unit_note(unit):
  return "" if unit == "tokens" else (
      f", where texts count in {escape(unit)}: name a --tokenizer to count them in tokens")


def _section(report):
  return (f"<section><h2>{escape(report.mode)}</h2>{_lengths(report)}"
          f"{_offenders(report)}{_samples(report)}</section>")


def _lengths(report):
  if not len(report.lengths["total"]):
    return '<p class="data">No usable row.</p>'
  rows = []
  for kind, values in report.lengths.items():
    cuts = (values.min(), np.median(values), np.percentile(values, 95), values.max())
    rows.append([kind, *(f"{x:,.0f}" for x in cuts), f"{values.sum():,}"])
  return (_table(["tokens of a sample", "least", "median", "95 %", "most", "of all"], rows)
          + _histogram(report.lengths["total"]))


def _histogram(values):
  """Bars of how many samples are how long, from 0 to the longest."""
  counts, edges = np.histogram(values, bins=_BINS, range=(0, max(int(values.max()), 1)))
  width, height, step = 640, 120, 640 / _BINS
  bars = "".join(
      f'<rect x="{i * step:.1f}" y="{height - h:.1f}" width="{step - 1.5:.1f}" height="{h:.1f}">'
      f"<title>{edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens: {count:,} samples</title></rect>"
      for i, count in enumerate(counts) if (h := height * count / counts.max()))
  return (
      f'<svg viewBox="0 -16 {width} {height + 36}" role="img" aria-label="Samples by length">'
      f'{bars}<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
      f'<text x="0" y="-4">{counts.max():,} samples in the highest bar</text>'
      f'<text x="0" y="{height + 16}">0</text><text x="{width}" y="{height + 16}" '
      f'text-anchor="end">{edges[-1]:,.0f} tokens</text></svg>')


def _offenders(report):
  offenders = report.metadata["offenders"]
  if not offenders:
    return ""
  complete = sum(report.metadata["rejected"].values()) == len(offenders)
  note = f"Rejected rows{'' if complete else ', the first of them'}"
  return (f'<p class="data">{note}</p>'
          + _table(["file", "row", "reason", "what is wrong"], offenders))


def _samples(report):
  cards = "".join(_sample(record) for record in report.samples)
  return f'<ul class="samples">{cards}</ul>' if cards else ""


def _sample(record):
  parts = "".join(_text(p) if isinstance(p, TextPart) else _image(p) for p in record.parts)
  return f'<li><div class="label">row {record.index}</div>{parts}</li>'


def _text(part):
  return f'<p dir="auto">{_tags(learnt=part.need_loss)}{escape(part.text)}</p>'


def _image(part):
  image = Image.fromarray(images.decode_image(part.data, "a sample's picture"))
  width, height = image.size
  image.thumbnail((_THUMBNAIL, _THUMBNAIL))
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=88)
  encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
  tags = _tags(learnt=part.need_loss, VAE=part.need_vae, ViT=part.need_vit)
  return (f'<figure><img alt="an image of the sample" src="data:image/jpeg;base64,{encoded}">'
          f"<figcaption>{tags}{width} × {height}</figcaption></figure>")


def _tags(**flags):
  return "".join(f'<span class="tag">{name}</span>' for name, on in flags.items() if on)


def _table(head, rows):
  """A table whose columns of numbers are aligned at the right."""
  numeric = [all(str(row[i]).replace(",", "").isdigit() for row in rows) for i in range(len(head))]
  line = lambda tag, values: "".join(
      f'<{tag}{" class=n" * right}>{escape(short(str(value), 300))}</{tag}>'
      for right, value in zip(numeric, values))
  body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
  return (f'<div class="scroll data"><table><thead><tr>{line("th", head)}</tr></thead>'
          f"<tbody>{body}</tbody></table></div>")
