"""VAE moments of images, computed on a process's own devices: during training or beforehand.

Images are encoded in groups of equal size. A group is filled with copies to one of a few sizes,
so that few programs are compiled; no image is padded (docs/spec.md, section 8).
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os

import einops
import jax
import numpy as np

from irg_jax import runs, sharding, storage
from irg_jax.config import ModelConfig
from irg_jax.data import sources as sources_lib
from irg_jax.data.array_records import INFO
from irg_jax.data.records import ImagePart
from irg_jax.data.samples import posterior_latents
from irg_jax.images import ImageTransform, decode_image
from irg_jax.storage import scratch_folder

# Of a group, on each device: the encoder's first layers need about 2 KiB a pixel.
_GROUP_PIXELS = 1024 * 1024
_WINDOW = 64  # records whose images are grouped together
_UNFINISHED, _PLAN = ".encoding", "encoding.json"


class Encoder:
  """Encodes images with a frozen VAE.

  Args:
    model: sizes, and the dtype of the arithmetic.
    encode: `model.vae.encode_levels`: (model, params, uint8 [N, H, W, 3]) -> moments
      float32 [N, 2, h, w, z].
    devices: each gets a copy of the parameters; default: all of this process.
  """

  def __init__(self, model: ModelConfig, params, encode, devices=None):
    self._model, self._encode = model, encode
    devices = devices or jax.local_devices()
    mesh = sharding.make_mesh({"data": len(devices)}, devices)
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.P(*axes))
    self._devices, self._rows = mesh.size, place("data")
    self._params = jax.device_put(params, place())

  def moments(self, images) -> list[np.ndarray]:
    """Posteriors of images, uint8 [H, W, 3] of any sizes that the VAE can halve.

    Returns float32 [2, h, w, z] for each: mean and log-variance, unscaled.
    """
    groups, found = {}, [None] * len(images)
    for i, image in enumerate(images):
      groups.setdefault(image.shape, []).append(i)
    for (height, width, _), members in sorted(groups.items()):
      most = max(_GROUP_PIXELS // (height * width), 1) * self._devices
      for start in range(0, len(members), most):
        some = members[start:start + most]
        for i, one in zip(some, self._group([images[i] for i in some])):
          found[i] = one
    return found

  def _group(self, images):
    count = self._devices  # then twice that, and so on
    while count < len(images):
      count *= 2
    filled = images + images[-1:] * (count - len(images))
    levels = jax.device_put(np.stack(filled), self._rows)
    return np.asarray(self._encode(self._model, self._params, levels))[:len(images)]

  def __call__(self, batch, images):
    """Returns a `data.batch.Batch` of numpy arrays with the noise of posteriors made latents.

    `images` is a list of (row, first token in gen, uint8 [H, W, 3]).
    """
    latents_BGC = batch.latents.copy()
    found = self.moments([pixels for _, _, pixels in images])
    for (row, first, pixels), moments in zip(images, found):
      rows, columns = (side // self._model.pixel_stride for side in pixels.shape[:2])
      here_PC = latents_BGC[row, first:first + rows * columns]
      noise_YXC = einops.rearrange(here_PC, "(y x) c -> y x c", y=rows)
      here_PC[:] = einops.rearrange(
          posterior_latents(moments, noise_YXC, self._model), "y x c -> (y x) c")
    return dataclasses.replace(batch, latents=latents_BGC)

  def fingerprint(self) -> str:
    """A short text that differs for other weights."""
    digest = hashlib.sha256(self._model.dtype.encode())
    for x in jax.tree.leaves(self._params):
      digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()[:16]


def encode_dataset(sources, out, encoder: Encoder, transform: ImageTransform, *,
                   dtype: str = "float32", process_index: int = 0, process_count: int = 1,
                   shard_records: int = 256, progress=None) -> dict[str, str]:
  """Writes the records of `sources` again, with the moments of the images that the VAE sees.

  Every process writes each `process_count`-th file of a mode into OUT/.encoding. The process that
  finds all files complete makes them the dataset OUT/irgl/MODE, where they are from the start in
  a bucket. Files of a run that was killed are kept, and the same call continues it. Processes share
  `out` and nothing else.

  Args:
    sources: see `sources.open_sources`.
    transform: brings images to the size at which they are encoded.
    dtype: of the stored moments, "float32" or "float16".
    shard_records: records of a file.

  Returns:
    By mode: "written", "waiting" (for files of other processes) or "there" (already).

  Raises:
    ValueError: there are files of another VAE, transform, dtype or source, see
      `runs.check_same`; a record cannot be encoded.
  """
  settings = {"vae_transform": dataclasses.asdict(transform), "moments": dtype,
              "vae": encoder.fingerprint()}
  encode = lambda records: _with_moments(records, encoder, transform, dtype)
  return {mode: _encode_mode(mode, source, storage.path(out), encode, settings, shard_records,
                             slice(process_index, None, process_count), progress)
          for mode, source in sources.items()}


def _encode_mode(mode, source, out, encode, settings, shard_records, own, progress):
  home = folder = sources_lib.mode_folder(out, mode)
  done = home / INFO[-1]  # in a bucket, where a folder is not renamed
  if storage.is_local(out):
    folder, done = sources_lib.mode_folder(out / _UNFINISHED, mode), home.parent
  metadata = dict(getattr(source, "metadata", {})) | settings
  # Offenders are named by path, which may differ between hosts.
  same = {name: value for name, value in metadata.items() if name != "offenders"}
  rows = {"source": sources_lib.fingerprint(source)}  # records of older versions lack it
  plan = {"records": len(source), "shard_records": shard_records} | rows | same
  if done.exists():
    runs.check_same(rows | runs.read(home / _PLAN), plan, str(home.parent))
    return "there"
  runs.create(folder / _PLAN, plan)
  runs.check_same(rows | runs.read(folder / _PLAN), plan, str(folder.parent))
  starts = range(0, len(source), shard_records)
  shards = [(sources_lib.shard_path(folder, number, len(starts)),
             range(start, min(start + shard_records, len(source))))
            for number, start in enumerate(starts)]
  for path, records in shards[own]:
    if progress:
      progress(f"encoding {mode}", 0, records.start, len(source))
    if not path.exists():
      sources_lib.write_shard(path, encode(source[i] for i in records))
  return _finish(out, mode, shards, metadata)


def _with_moments(records, encoder, transform, dtype):
  """The records with moments in their images for the VAE, window by window."""
  read = lambda pair: transform(decode_image(pair[1].data, _name(pair[0])))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while window := list(itertools.islice(records, _WINDOW)):
      wanted = [(record, part) for record in window for part in record.parts if _is_encoded(part)]
      moments = iter(encoder.moments(list(pool.map(read, wanted))))
      for record in window:
        parts = (dataclasses.replace(part, moments=_cast(next(moments), dtype, record))
                 if _is_encoded(part) else part for part in record.parts)
        yield dataclasses.replace(record, parts=tuple(parts))


def _is_encoded(part):
  return isinstance(part, ImagePart) and (part.need_loss or part.need_vae)


def _name(record):
  return f"{record.mode}, record {record.index}"


def _cast(moments, dtype, record):
  with np.errstate(over="ignore"):  # reported below
    moments = moments.astype(dtype)
  if not np.isfinite(moments).all():
    raise ValueError(f"{_name(record)}: the VAE gives moments that {dtype} cannot hold; check the "
                     "checkpoint, or store float32")
  return moments


def _finish(out, mode, shards, metadata):
  """Makes the files a dataset if all are there; several processes may try at once."""
  home, folder, unfinished = (
      sources_lib.mode_folder(out, mode), shards[0][0].parent, out / _UNFINISHED)
  if not all(path.exists() for path, _ in shards):
    return "there" if home.exists() and home != folder else "waiting"
  lengths = [len(records) for _, records in shards]
  size = sum(path.stat().st_size for path, _ in shards)
  if home == folder:  # in a bucket
    with storage.atomic_files(home) as made:
      sources_lib.write_info(out, mode, lengths, size, metadata, made)
    return "written"
  try:
    with scratch_folder(unfinished) as scratch:
      made = sources_lib.mode_folder(scratch, mode)
      made.mkdir(parents=True)
      sources_lib.write_info(scratch, mode, lengths, size, metadata)
      for file in made.iterdir():
        os.replace(file, folder / file.name)
      home.parent.parent.mkdir(parents=True, exist_ok=True)
      os.rename(folder.parent, home.parent)
  except OSError:
    if not home.exists():  # else another process was faster
      raise
  with contextlib.suppress(OSError):  # other modes are in there
    (unfinished / sources_lib.NAME).rmdir()
    unfinished.rmdir()
  return "written"
