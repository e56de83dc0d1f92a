"""`irg data encode-latents`: the records again, with the VAE moments of their images.

The files of a mode grow aside, in OUT/.encoding, and move to OUT/irgl/MODE when all are there.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib

import numpy as np

from irg_jax import images
from irg_jax.data import array_records, irgl
from irg_jax.data.latents import Encoder
from irg_jax.data.records import ImagePart
from irg_jax.storage import scratch_folder, write_text

_ASIDE, _PLAN = ".encoding", "encoding.json"
_WINDOW = 64  # records whose images are grouped together


def encode_dataset(sources, out, encoder: Encoder, transform: images.ImageTransform, *,
                   dtype: str = "float32", process_index: int = 0, process_count: int = 1,
                   shard_records: int = 256, progress=None) -> dict[str, str]:
  """Writes the records of `sources` again, with the moments of the images that the VAE sees.

  Every process writes each `process_count`-th file; the one that finds all files there makes
  them the dataset OUT/irgl/MODE. What a killed run has finished is kept: the same call goes
  on. Processes need a common `out`, and nothing else of each other.

  Args:
    sources: {mode: source}, see `sources.open_sources`.
    transform: brings images to the size at which they are encoded.
    dtype: of the stored moments, "float32" or "float16".
    shard_records: records of a file.
    progress: see `irg_jax.progress.Progress`.

  Returns:
    By mode: "written", "waiting" (for files of other processes) or "there" (already).

  Raises:
    ValueError: there are files of another VAE, transform or source; a record that cannot be
      encoded.
  """
  settings = {"vae_transform": dataclasses.asdict(transform), "moments": dtype,
              "vae": encoder.fingerprint()}
  encode = lambda records: _with_moments(records, encoder, transform, dtype)
  return {mode: _encode_mode(mode, source, pathlib.Path(out), encode, settings,
                             (process_index, process_count), shard_records, progress)
          for mode, source in sources.items()}


def _encode_mode(mode, source, out, encode, settings, process, shard_records, progress):
  home = array_records.mode_folder(out, mode)
  folder = array_records.mode_folder(out / _ASIDE, mode)
  metadata = dict(getattr(source, "metadata", {})) | settings
  # Offenders are named by path, which may differ from host to host.
  same = {name: value for name, value in metadata.items() if name != "offenders"}
  plan = json.dumps({"records": len(source), "shard_records": shard_records} | same,
                    sort_keys=True)
  if home.parent.exists():
    _check_same(home / _PLAN, plan)
    return "there"
  _write_plan(folder / _PLAN, plan)
  _check_same(folder / _PLAN, plan)
  starts = range(0, len(source), shard_records)
  paths = [array_records.shard_path(folder, k, len(starts)) for k in range(len(starts))]
  ends = [min(start + shard_records, len(source)) for start in starts]
  for number in range(process[0], len(paths), process[1]):
    if progress:
      progress(f"encoding {mode}", 0, starts[number], len(source))
    if not paths[number].exists():
      records = (source[i] for i in range(starts[number], ends[number]))
      array_records.write_shard(paths[number], encode(records))
  return _finish(out, mode, paths, [e - s for s, e in zip(starts, ends)], metadata)


def _write_plan(path, plan):
  path.parent.mkdir(parents=True, exist_ok=True)
  if not path.exists():
    write_text(path, plan)


def _check_same(path, plan):
  """What is there must come from the settings of this run."""
  if not path.exists() or path.read_text() != plan:
    raise ValueError(f"{path.parent} is of another VAE, vae_transform, dtype or source; remove "
                     "it, or choose another folder")


def _with_moments(records, encoder, transform, dtype):
  """The records, window by window, each with moments in its images for the VAE."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while window := list(itertools.islice(records, _WINDOW)):
      wanted = [(r, p) for r, record in enumerate(window) for p, part in enumerate(record.parts)
                if isinstance(part, ImagePart) and (part.need_loss or part.need_vae)]
      read = lambda where: transform(images.decode_image(
          window[where[0]].parts[where[1]].data,
          f"{window[where[0]].mode}, record {window[where[0]].index}"))
      moments = dict(zip(wanted, encoder.moments(list(pool.map(read, wanted)))))
      for r, record in enumerate(window):
        parts = [_with(part, moments.get((r, p)), dtype, record)
                 for p, part in enumerate(record.parts)]
        yield dataclasses.replace(record, parts=tuple(parts))


def _with(part, moments, dtype, record):
  if moments is None:
    return part
  with np.errstate(over="ignore"):  # named below
    moments = moments.astype(dtype)
  if not np.isfinite(moments).all():
    raise ValueError(f"{record.mode}, record {record.index}: the VAE gives moments that {dtype} "
                     "cannot hold; check the checkpoint, or store float32")
  return dataclasses.replace(part, moments=moments)


def _finish(out, mode, paths, lengths, metadata):
  """Makes a dataset of the files if all are there. Any number of processes may try at once."""
  home, folder = array_records.mode_folder(out, mode), paths[0].parent
  aside = out / _ASIDE
  if not all(path.exists() for path in paths):
    return "there" if home.exists() else "waiting"
  try:
    with scratch_folder(aside) as scratch:
      made = array_records.mode_folder(scratch, mode)
      made.mkdir(parents=True)
      irgl.write_info(scratch, mode, lengths, sum(p.stat().st_size for p in paths), metadata)
      for file in made.iterdir():
        os.replace(file, folder / file.name)
      home.parent.parent.mkdir(parents=True, exist_ok=True)
      os.rename(folder.parent, home.parent)
  except OSError:
    if not home.exists():  # else another process was faster
      raise
  for empty in (aside / array_records.NAME, aside):
    try:
      empty.rmdir()
    except OSError:  # other modes are still in there
      break
  return "written"
