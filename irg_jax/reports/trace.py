"""Traces on disk: images, `trace.json`, and a page that shows thoughts and images side by side.

A trace is a plain dict:

  {"prompt": str, "system_prompt": str, "seed": int, "checkpoint": str,
   "settings": {...}, "versions": {...},
   "read_as": str (optional), the prompt in the form that the model was trained on,
   "note": str (optional), what the model cannot know of it,
   "sources": [uint8 [H, W, 3], ...] (optional), images that were edited, for the page alone,
   "rounds": [{"think": str, or None in a round without a thought,
               "think_tokens": int, "hit_limit": bool, "tokens_cut": int (optional),
               "picture": uint8 [H, W, 3], or None in a round without an image,
               "seconds": {"think": float, "draw": float, ...}}]}

Writes are atomic (`irg_jax.storage`): a new folder appears complete; in an existing one, each file.
"""

import itertools
import json
import pathlib
import re

from irg_jax.images import encode_image
from irg_jax.reports import pages
from irg_jax.storage import atomic_files, check_output_folder, write_text

_OWN_FILES = re.compile(r"round\d+\.png|trace\.json|trace\.html")


def check_trace_folder(folder) -> None:
  """`check_output_folder`, and an existing folder must be empty or hold an earlier trace.

  Hidden files may be there.

  Raises:
    ValueError: `write_trace` would fail, or would add to files that are not its own.
  """
  check_output_folder(folder)
  names = sorted(path.name for path in pathlib.Path(folder).glob("[!.]*"))
  if others := [n for n in names if not _OWN_FILES.fullmatch(n)]:
    raise ValueError(f"{folder} holds files that are not an earlier trace ({others[0]!r}, "
                     f"{len(others)} in all); choose another output folder")


def write_trace(folder, trace: dict) -> dict:
  """Writes `round1.png`, ..., `trace.json` and the self-contained `trace.html`.

  Args:
    folder: a folder to make, an empty one, or an earlier trace to replace.
    trace: see the top of this file.

  Returns:
    The entry for `write_index`.

  Raises:
    ValueError: see `check_trace_folder`.
  """
  check_trace_folder(folder)
  folder = pathlib.Path(folder).absolute()
  pngs = [entry["png"] for entry in with_pngs(trace)]
  names = [f"round{number}.png" if png else None for number, png in enumerate(pngs, 1)]
  rounds = [entry | {"picture": name} for entry, name in zip(trace["rounds"], names)]
  record = {key: value for key, value in trace.items() if key != "sources"} | {"rounds": rounds}
  plain = lambda x: x.tolist() if hasattr(x, "tolist") else str(x)  # numpy values, paths
  with atomic_files(folder) as partial:
    for name, png in zip(names, pngs):
      if png:
        (partial / name).write_bytes(png)
    write_text(partial / "trace.json",
               json.dumps(record, indent=2, ensure_ascii=False, default=plain) + "\n")
    write_text(partial / "trace.html", _page(trace, pngs))
  for path in folder.glob("round*.png"):  # of an earlier trace with more rounds
    if _OWN_FILES.fullmatch(path.name) and path.name not in names:
      path.unlink()
  last = next(filter(None, reversed(pngs)), None)
  return {"folder": folder.name, "prompt": trace["prompt"], "rounds": len(names),
          "seed": trace.get("seed"), "small": pages.small(last),
          "image": next(filter(None, reversed(names)), None)}


def write_index(folder, entries: list[dict]) -> None:
  """Writes `index.html` beside trace folders: final image and prompt of each, linked to its page.

  `entries` are the results of `write_trace`, in the order to show them.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / "index.html", pages.render("index", entries=entries))


def with_pngs(trace) -> list[dict]:
  """The rounds of a trace, each with its image as a file: "png", or None without an image."""
  return [entry | {"png": _png(entry.get("picture"))} for entry in trace["rounds"]]


def _png(image):
  return None if image is None else encode_image(image)


def _page(trace, pngs):
  rounds = [entry | {"png": png} for entry, png in zip(trace["rounds"], pngs)]
  seconds = [entry.get("seconds") or {} for entry in rounds]
  phases = list(dict.fromkeys(itertools.chain(*seconds)))
  timings = [[f"Round {number}", *(f"{took[p]:.2f}" if p in took else "" for p in phases),
              "" if entry.get("think") is None else entry.get("think_tokens", "")]
             for number, (entry, took) in enumerate(zip(rounds, seconds), 1)]
  run = {"checkpoint": trace.get("checkpoint"), "seed": trace.get("seed")}
  tables = {"Run": run, "Settings": trace.get("settings"), "Versions": trace.get("versions")}
  return pages.render(
      "trace", trace=trace, rounds=rounds, sources=list(map(_png, trace.get("sources") or ())),
      last=max((number for number, png in enumerate(pngs, 1) if png), default=None),
      seconds=sum(sum(took.values()) for took in seconds),
      timings=(["", *phases, "thought, tokens"], timings),
      tables=[(title, list(pages.flat(values or {}))) for title, values in tables.items()])
