"""Where the official scorers expect each image. Every round has a root of its own.

  OUT/round1/...      what the benchmark's own code is pointed at; OUT/round2/... likewise
  OUT/traces/...      thoughts and seeds, a JSON file an image; the scorers never look here
  OUT/cells/...       OneIG's single images until their grid is complete

GenEval      roundN/00000/samples/00000.png ... 00003.png, and roundN/00000/metadata.jsonl
mini         as GenEval
WISE         roundN/901.png
TIIF         roundN/color+2d/irg_jax/short_description/0.png
GenAI-Bench  roundN/irg_jax/00001.jpeg
OneIG        roundN/images/anime/irg_jax/000.webp, four images in a 2 x 2 grid
"""

import hashlib
import json
import pathlib

import numpy as np

from irg_jax.evaluate.prompts import Item

MODEL = "irg_jax"  # the model's name where a layout has one
SAMPLES = ("geneval", "mini")  # a folder a prompt: images that are scored one by one, its record


def seed(benchmark: str, item_id: str, image: int) -> int:
  """Seed of an image, 0 to 2**32 - 1; nothing but the three arguments takes part."""
  digest = hashlib.sha256(json.dumps([benchmark, item_id, image]).encode()).digest()
  return int.from_bytes(digest[:4], "big")


def round_root(round: int) -> pathlib.PurePath:
  """What a benchmark's own code is pointed at; rounds count from 1."""
  return pathlib.PurePath(f"round{round}")


def image_path(benchmark: str, item: Item, image: int, round: int) -> pathlib.PurePath:
  """Where an image is, under --out; OneIG's four of a prompt share one file.

  Args:
    image: from 0.
    round: from 1.
  """
  root, parts = round_root(round), item.id.split("/")
  if benchmark in SAMPLES:
    return root / item.id / "samples" / f"{image:05}.png"
  if benchmark == "wise":
    return root / f"{item.id}.png"
  if benchmark == "tiif":
    return root / parts[0] / MODEL / f"{parts[1]}_description" / f"{parts[2]}.png"
  if benchmark == "genai_bench":
    return root / MODEL / f"{item.id}.jpeg"
  if benchmark == "oneig":
    return root / "images" / parts[0] / MODEL / f"{parts[1]}.webp"
  raise ValueError(f"unknown benchmark {benchmark!r}")


def metadata_path(item: Item, round: int) -> pathlib.PurePath:
  """The record of a prompt, beside its samples, where the benchmark is one of `SAMPLES`."""
  return round_root(round) / item.id / "metadata.jsonl"


def cell_path(item: Item, image: int, round: int) -> pathlib.PurePath:
  """Where OneIG's image waits for the others of its grid."""
  return pathlib.PurePath("cells", f"round{round}", item.id, f"{image}.png")


def trace_path(item: Item, image: int) -> pathlib.PurePath:
  """The trace of an image; where it is, all files of the image are."""
  return pathlib.PurePath("traces", item.id, f"{image}.json")


def grid(cells: list[np.ndarray | None], height: int, width: int) -> np.ndarray:
  """Four images [height, width, 3] as one of two rows and two columns, row by row.

  None is an image that failed: a black cell, which the official code leaves out.
  """
  black = np.zeros((height, width, 3), np.uint8)
  a, b, c, d = (black if cell is None else cell for cell in cells)
  return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])
