"""Traces on disk: images, `trace.json`, and a page that shows thoughts and images side by side.

A trace is a plain dict:

  {"prompt": str, "system_prompt": str, "seed": int, "checkpoint": str,
   "fingerprint": str, of the checkpoint and the images to edit,
   "settings": {...}, "versions": {...},
   "unfinished": true (optional), rounds are missing; the last one may have no image yet,
   "read_as": str (optional), the prompt in the form that the model was trained on,
   "note": str (optional), what the model cannot know of it,
   "sources": [uint8 [H, W, 3], ...] (optional), images that were edited, for the page alone,
   "rounds": [{"think": str, or None in a round without a thought,
               "think_tokens": int, "hit_limit": bool, "tokens_cut": int (optional),
               "picture": uint8 [H, W, 3], or None in a round without an image,
               "sha256": str (optional), digest of its file, added on writing,
               "passes": int (optional), times that the decoder ran for the image,
               "kept": true (optional), its image is that of the round before,
               "seconds": {"think": float, "draw": float, ...}}]}

Writes are atomic (`irg_jax.storage`): a new folder appears complete; in an existing one, each file.
"""

import hashlib
import itertools
import json
import re

from irg_jax import storage
from irg_jax.images import encode_image, read_image
from irg_jax.reports import pages
from irg_jax.storage import (
    atomic_files, check_output_folder, read_json, remove_partials, write_text)

# Two runs that agree in these have the same rounds.
_IDENTITY = ("prompt", "read_as", "system_prompt", "seed", "checkpoint", "fingerprint", "settings",
             "versions")
_KINDS = {"think": str | None, "hit_limit": bool, "tokens_cut": int, "seconds": dict,
          "picture": str | None}
_OWN_FILES = re.compile(r"round\d+\.png|trace\.json|trace\.html")


def check_trace_folder(folder) -> None:
  """`check_output_folder`, and an existing folder must be empty or hold an earlier trace.

  Hidden files may be there.

  Raises:
    ValueError: `write_trace` would fail, or would add to files that are not its own.
  """
  check_output_folder(folder)
  names = sorted(path.name for path in storage.path(folder).glob("[!.]*"))
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
  folder = storage.path(folder).absolute()
  pngs = [entry["png"] for entry in with_pngs(trace)]
  names = [f"round{number}.png" if png else None for number, png in enumerate(pngs, 1)]
  rounds = [entry | {"picture": name} | ({"sha256": _digest(png)} if png else {})
            for entry, name, png in zip(trace["rounds"], names, pngs)]
  record = {key: value for key, value in trace.items() if key != "sources"} | {"rounds": rounds}
  with atomic_files(folder) as partial:
    for name, png in zip(names, pngs):
      if png:
        (partial / name).write_bytes(png)
    write_text(partial / "trace.json",
               json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n")
    write_text(partial / "trace.html", _page(trace, pngs))
  return finish_trace(folder)


def read_rounds(folder, trace: dict) -> list[dict]:
  """Rounds that an earlier run of the same prompt, seed and settings left in `folder`.

  Args:
    trace: see the top of this file; its rounds do not count.

  Returns:
    Rounds as at the top of this file. A damaged image and all that follows it are left out. Empty
    without a trace, or for one of another run.
  """
  folder = storage.path(folder)
  try:
    record = read_json(folder / "trace.json")
    own = json.loads(json.dumps(trace, default=_plain))
    if any(record.get(name) != own.get(name) for name in _IDENTITY):
      return []
    found = []
    for entry in record["rounds"]:
      if not (all(isinstance(entry[name], kind) for name, kind in _KINDS.items())
              and isinstance(entry.get("kept", False), bool)):
        break
      found.append(entry | {"picture": _read_image(folder, entry)})
      if found[-1]["picture"] is None:
        break
    return found
  except (OSError, ValueError, KeyError, TypeError):
    return []


def finish_trace(folder) -> dict:
  """Removes what killed runs and an earlier trace with more rounds left beside a trace.

  Returns:
    The entry for `write_index`.
  """
  folder = storage.path(folder).absolute()
  remove_partials(folder)
  record = read_json(folder / "trace.json")
  names = [entry["picture"] for entry in record["rounds"]]
  for path in folder.glob("round*.png"):
    if _OWN_FILES.fullmatch(path.name) and path.name not in names:
      path.unlink()
  last = next(filter(None, reversed(names)), None)
  return {"folder": folder.name, "prompt": record["prompt"], "rounds": len(names),
          "seed": record.get("seed"), "image": last, "small": pages.small(last and folder / last)}


def write_index(folder, entries: list[dict]) -> None:
  """Writes `index.html` beside trace folders: final image and prompt of each, linked to its page.

  `entries` are the results of `write_trace`, in the order to show them.
  """
  folder = storage.path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / "index.html", pages.render("index", entries=entries))


def with_pngs(trace) -> list[dict]:
  """The rounds of a trace, each with its image as a file: "png", or None without an image."""
  return [entry | {"png": _png(entry.get("picture"))} for entry in trace["rounds"]]


def _read_image(folder, entry):
  """The image of a round in trace.json; None where there is none or its file was changed."""
  if not (name := entry["picture"]) or not _OWN_FILES.fullmatch(name):
    return None
  path = folder / name
  same = path.is_file() and _digest(path.read_bytes()) == entry.get("sha256")
  return read_image(path) if same else None


def _digest(data):
  return hashlib.sha256(data).hexdigest()


def _plain(value):
  """The JSON of numpy values and paths."""
  return value.tolist() if hasattr(value, "tolist") else str(value)


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
