"""Checkpoints in the published layout: `ema.safetensors` (or shards), `ae.safetensors`, JSON.

Reading and writing go tensor by tensor, so that no second copy of the model ever exists.
"""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from irg_jax import leases, storage
from irg_jax.config import ModelConfig
from irg_jax.model.layers import SCALE
from irg_jax.weights import int8, names, ranges
from irg_jax.weights.configs import (
    check_table, copy_tokenizer, read_config, sincos_table, table_grids, write_configs)
from irg_jax.weights.names import CheckpointError, Row, listing
from irg_jax.weights.safetensors import (
    DTYPES, VIT, VIT_FILE, Pending, Tensor, all_finite, find_tensors, in_order, write_tensors)

# Position table -> the layer to whose output it is added.
_TABLE_LAYERS = {"latent_pos_embed.pos_embed": "latent_embed",
                 "vit_pos_embed.pos_embed": "connector/fc2"}


def load(folder, config: ModelConfig | None = None, *, shardings=None, dtype=None,
         part: str = "", form: int8.Form = int8.Form()) -> dict:
  """Reads {"transformer": ..., "vae": ...} of a published folder straight into their shards.

  Every key and shape is checked before any tensor is read. The position tables are checked
  against the computed ones and left out.

  Args:
    config: None: the folder's own.
    shardings: tree of `jax.sharding.Sharding` as of `names.abstract_params`; a process reads only
      what its devices hold. None: everything on the default device.
    dtype, part: as of `weights.load_checkpoint`; of "vae" alone, the other file is not looked at.
    form: what becomes of the parameters.

  Raises:
    CheckpointError: a file or key that is missing, surplus, there twice, of another shape,
      truncated or not finite; a table that disagrees; a config that contradicts the weights; int8
      numbers without scales.
  """
  folder = storage.path(folder)
  config = config or read_config(folder)
  stems = ("ae",) if part == "vae" else ("ema", "ae")
  tensors = {stem: find_tensors(folder, stem) for stem in stems}
  for stem, found in tensors.items():
    _check_header(stem, found, config, dtype)
  for key, grid in table_grids(config).items() if "ema" in tensors else ():
    check_table(tensors["ema"][key], grid)
  table = {row.path: row for row in names.rows(config)}
  placed = dict.fromkeys(table) if shardings is None else names.flatten(shardings)
  if placed.keys() != table.keys():
    raise ValueError(f"shardings do not have the structure of the parameters; they differ in "
                     f"{listing(placed.keys() ^ table.keys())}")
  leaves = {}
  for path, row in table.items():
    if path.startswith(part):
      layers = [tensors[row.file][key] for key in row.keys]
      leaves |= _load_as(form, row, layers, placed[path], dtype)
  return names.unflatten(leaves)


def is_int8(folder) -> bool:
  """Whether matrices of a published folder are int8."""
  return any(t.stored == np.int8 for t in find_tensors(storage.path(folder), "ema").values())


def save(folder, params: dict, config: ModelConfig, *, dtype=None, source=None,
         max_shard_bytes: int | None = None) -> None:
  """Writes parameters in the published layout; the folder appears when it is complete.

  What `load` read is written bit for bit in the same dtype, int8 matrices with their scales
  (X.weight_scale, [out]) whatever `dtype` is. The position tables are computed,
  in the dtype of the layer that they are added to. If an array is spread over several processes,
  all of them call this: the first one writes, the others send it their shards, tensor by tensor.

  Args:
    params: {"transformer": ..., "vae": ...} of arrays, sharded or not, jax or numpy.
    dtype: to write; None: each parameter's own.
    source: a checkpoint folder whose tokenizer files and further config fields are kept.
    max_shard_bytes: splits `ema.safetensors` into files of at most so many bytes of tensors.

  Raises CheckpointError for parameters that are not finite or do not fit `config` or `dtype`,
  FileExistsError for a folder that is not empty.
  """
  leaves = names.check_params(params, config)
  pending, width = {"ema": [], "ae": []}, config.llm.hidden_size
  for row in names.stored_rows(leaves, config):
    own = leaves[row.path].dtype == np.int8 or row.path.endswith(SCALE)
    pending[row.file] += _pending(row, leaves[row.path], None if own else dtype)
  for key, grid in table_grids(config).items():
    to = np.dtype(dtype or leaves[f"transformer/{_TABLE_LAYERS[key]}/kernel"].dtype)
    make = lambda grid=grid, to=to: sincos_table(width, grid).astype(to)
    pending["ema"].append(Pending(key, to, (grid * grid, width), make))
  if jax.process_index() > 0:
    for tensor in in_order(pending["ema"]) + in_order(pending["ae"]):
      tensor.make()
    return
  with leases.new_folder(folder) as partial:
    write_configs(partial, config, source)
    write_tensors(partial, "ema", pending["ema"], max_shard_bytes)
    write_tensors(partial, "ae", pending["ae"])
    copy_tokenizer(source, partial)


def _check_header(stem, tensors: dict[str, Tensor], config, dtype):
  """Keys, shapes and dtypes of one file (or its shards) against the table."""
  table = [row for row in names.rows(config) if row.file == stem]
  shapes = {key: row.published_shape for row in table for key in row.keys}
  sources = {key: row.config_file for row in table for key in row.keys}
  if stem == "ema":
    shapes |= {k: (n * n, config.llm.hidden_size) for k, n in table_grids(config).items()}
  path = next((t.path for t in tensors.values()), f"{stem}.safetensors")
  missing, surplus = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
  if stem == "ema" and not any(key.startswith(VIT) for key in tensors):
    raise CheckpointError(
        f"{path}: holds no ViT, as training with visual_und False saves it; link the "
        f"ema.safetensors of the model that it was trained from as {path.parent / VIT_FILE}, of "
        "which only the ViT is read")
  if missing or surplus:
    raise CheckpointError(
        f"{path}: not the keys of this model; missing: {listing(missing) or 'none'}; surplus: "
        f"{listing(surplus) or 'none'}{_key_hint(tensors, table, missing)}")
  for key, shape in shapes.items():
    if tensors[key].shape != shape:
      raise CheckpointError(
          f"{tensors[key].path}: {key} has shape {tensors[key].shape}, but {shape} follows from "
          f"{sources.get(key, 'vit_config.json or llm_config.json')}; use the config of these "
          "weights")
    if tensors[key].stored == np.int8 and tensors[key].scale is None:
      raise CheckpointError(
          f"{tensors[key].path}: {key} is int8 and has no scale; expected {key}_scale with a "
          "number for each output: complete the file, or save the weights as bfloat16")
  for row in table if dtype is None else ():
    first = tensors[row.keys[0]]
    for t in (tensors[key] for key in row.keys):
      if t.dtype != first.dtype:
        raise CheckpointError(f"{t.path}: {t.key} is {t.dtype} but {first.key} is {first.dtype}; "
                              f"they become one array {row.path}, so choose a dtype for all")
    if first.dtype == np.float64:
      raise CheckpointError(f"{first.path}: {first.key} is float64; choose dtype float32")


def _key_hint(tensors, table, missing) -> str:
  """End of a message on wrong keys: another number of layers than the config's, or what to do."""
  count = collections.Counter(re.sub(r"\.\d+\.", ".{layer}.", key, count=1) for key in tensors)
  for row in table:
    if row.layers and count[row.key] not in (0, row.layers):
      return (f". {row.config_file} makes {row.layers} layers, the file has {count[row.key]} of "
              f"{row.key}; use the config of these weights")
  configs = " and ".join(sorted({row.config_file for row in table}))
  what = ("complete the file" if missing else
          "leave out what is no weight of BAGEL, such as heads that it does not use")
  return f"; {what}, or use the {configs} of these weights"


def _load_as(form: int8.Form, row: Row, layers: list[Tensor], sharding, dtype) -> dict:
  """{path: array} of a parameter, with scales where it is int8."""
  was_int8 = all(t.stored == np.int8 for t in layers)
  if form.keeps(row.path, was_int8):
    plain = [dataclasses.replace(t, scale=None) for t in layers]
    return dict(zip(int8.paths(row.path), (_load_row(row, plain, sharding, np.int8),
                                           int8.read_scales(layers, sharding))))
  if form.quantizes(row.path, was_int8):  # from the numbers in the file, whatever `dtype` is
    found = {t.dtype for t in layers}
    dtype = found.pop() if len(found) == 1 and found != {np.dtype(np.float64)} else np.float32
  return form.finish(row.path, _load_row(row, layers, sharding, dtype), was_int8)


def _load_row(row: Row, layers: list[Tensor], sharding, dtype):
  dtype = np.dtype(dtype or layers[0].dtype)
  if not storage.is_local(layers[0].path):
    return ranges.load_row(row, layers, sharding, dtype)

  @functools.cache  # devices that hold the same piece share one read and one buffer
  def read(bounds):
    return _read(row, layers, tuple(slice(*b) for b in bounds), dtype)

  shard = lambda index: read(tuple(s.indices(n)[:2] for s, n in zip(index, row.shape)))
  if sharding is None:
    array = jax.device_put(shard((slice(None),) * len(row.shape)))
  else:
    array = jax.make_array_from_callback(row.shape, sharding, shard, dtype=dtype)
  return array.block_until_ready()  # else host buffers would queue up for the device


def _read(row, layers, index, dtype):
  """One shard of a parameter, layers stacked, in our layout."""
  if row.layers:
    layers, index = layers[index[0]], index[1:]
  out = ranges.aligned((len(layers), *(s.stop - s.start for s in index)), dtype)
  for layer, target in zip(layers, out):
    layer.read_into(row.to_published(target), row.to_published_index(index))
  return out if row.layers else out[0]


def _pending(row, leaf, dtype) -> list[Pending]:
  dtype = np.dtype(dtype or leaf.dtype)
  if dtype not in DTYPES.values():
    raise CheckpointError(f"{row.path}: cannot write dtype {dtype}; choose one of "
                          f"{', '.join(map(str, DTYPES.values()))}")
  return [Pending(key, dtype, row.published_shape,
                  functools.partial(_to_host, row, leaf, layer, dtype))
          for layer, key in enumerate(row.keys)]


def _to_host(row, leaf, layer, dtype):
  """One layer of a parameter in the published layout and in `dtype`; raises if not finite."""
  if row.layers and isinstance(leaf, jax.Array) and (
      len(leaf.devices()) > 1 or next(iter(leaf.devices())).platform != "cpu"):
    # Sliced on the device, unless numpy can read it there without a copy: one layer moves to the
    # host, and no host copy stays with the array.
    leaf, layer = jax.lax.dynamic_index_in_dim(leaf, layer), 0
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    leaf = multihost_utils.process_allgather(leaf, tiled=True)  # in every process
  x = np.asarray(leaf)[layer] if row.layers else np.asarray(leaf)
  with np.errstate(over="ignore"):  # reported below
    y = x.astype(dtype, copy=False)
  if not all_finite(y):
    cause = f"numbers too large for {dtype}" if all_finite(x) else "NaN or infinite numbers"
    raise CheckpointError(f"{row.path} ({row.keys[layer]}): has {cause}; nothing was written")
  return row.to_published(y)
