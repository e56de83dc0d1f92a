"""Writes what a run produced: images, `trace.json`, and a page to read it by.

A trace is a plain dict:

  {"prompt": str, "system_prompt": str, "seed": int, "checkpoint": str,
   "settings": {...}, "versions": {...}, "note": str (optional),
   "source": uint8 [H, W, 3] (optional), the image that was edited, for the page alone,
   "rounds": [{"think": str, or None where the round had no thought,
               "think_tokens": int, "hit_limit": bool, "tokens_cut": int (optional),
               "picture": uint8 [H, W, 3], or None where it drew nothing,
               "seconds": {"think": float, "draw": float, ...}}]}

Writes are atomic (`irg_jax.storage`): a new folder as a whole, files in an existing one each.
"""

import io
import json
import pathlib
import re

import numpy as np
from PIL import Image

from irg_jax.reports import trace_page
from irg_jax.storage import atomic_files, check_output_folder, is_partial, write_text

_OWN_FILES = re.compile(r"round\d+\.png|trace\.json|trace\.html")


def check_trace_folder(folder) -> None:
  """As `check_output_folder`; an existing folder must be empty or an earlier trace.

  Raises:
    ValueError: `write_trace` would fail, or would replace files that are not its own.
  """
  check_output_folder(folder)
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return
  names = sorted(p.name for p in folder.iterdir())
  others = [n for n in names if not (_OWN_FILES.fullmatch(n) or is_partial(n))]
  if others:
    raise ValueError(f"{folder} holds files that are not an earlier trace ({others[0]!r}, "
                     f"{len(others)} in all); choose another output folder")


def write_trace(folder, trace: dict) -> dict:
  """Writes `round1.png`, ..., `trace.json` and the self-contained `trace.html`.

  Args:
    folder: the folder to make; or an empty one, or an earlier trace to replace.
    trace: see the top of this file.

  Returns:
    The entry for `write_index`.

  Raises:
    ValueError: see `check_trace_folder`.
  """
  check_trace_folder(folder)
  folder = pathlib.Path(folder).absolute()
  with atomic_files(folder) as partial:
    names = _write_files(partial, trace)
  for path in folder.iterdir():  # images of an earlier trace with more rounds
    if _OWN_FILES.fullmatch(path.name) and path.name not in names:
      path.unlink()
  return _index_entry(folder, trace)


def write_index(folder, entries: list[dict]) -> None:
  """Writes `index.html`: final image and prompt of each trace, linked to its page.

  Args:
    folder: the folder that holds the trace folders.
    entries: what `write_trace` returned for each, in the order to show them.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / "index.html", trace_page.index_html(entries))


def image_name(round_number: int) -> str:
  """File name of the image of a round, counted from 1."""
  return f"round{round_number}.png"


def _write_files(folder, trace):
  """Writes the files of a trace and returns their names."""
  pngs = [_png(entry.get("picture")) for entry in trace["rounds"]]
  for number, png in enumerate(pngs, 1):
    if png:
      (folder / image_name(number)).write_bytes(png)
  record = json.dumps(_without_images(trace), indent=2, ensure_ascii=False, default=_plain)
  write_text(folder / "trace.json", record + "\n")
  write_text(folder / "trace.html", trace_page.trace_html(trace, pngs, _png(trace.get("source"))))
  return {path.name for path in folder.iterdir()}


def _png(image):
  if image is None:
    return None
  file = io.BytesIO()
  Image.fromarray(np.asarray(image, np.uint8)).save(file, "png")
  return file.getvalue()


def _without_images(trace):
  """The trace with file names for images."""
  rounds = [
      entry | {"picture": None if entry.get("picture") is None else image_name(number)}
      for number, entry in enumerate(trace["rounds"], 1)
  ]
  return {k: v for k, v in trace.items() if k != "source"} | {"rounds": rounds}


def _index_entry(folder, trace):
  drawn = [i for i, r in enumerate(trace["rounds"], 1) if r.get("picture") is not None]
  return {
      "folder": folder.name,
      "prompt": trace["prompt"],
      "picture": image_name(drawn[-1]) if drawn else None,
      "rounds": len(trace["rounds"]),
      "seed": trace.get("seed"),
  }


def _plain(value):
  """JSON for what settings may hold beyond plain types: arrays, numpy numbers, paths."""
  return value.tolist() if hasattr(value, "tolist") else str(value)
