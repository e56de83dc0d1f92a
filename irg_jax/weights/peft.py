"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Keys are PEFT's over the published names: base_model.model.KEY.lora_A.weight [rank, in] and
lora_B.weight [out, rank], a pair for each layer.
"""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from irg_jax import leases, storage
from irg_jax.config import ModelConfig
from irg_jax.storage import write_json
from irg_jax.weights import lora, names
from irg_jax.weights.names import CheckpointError, listing
from irg_jax.weights.safetensors import Pending, read_header, read_json, write_tensors

CONFIG, STEM = "adapter_config.json", "adapter_model"
FILES = (CONFIG, f"{STEM}.safetensors")
_PREFIX = "base_model.model."
_SIDES = {"lora_A": lora.A, "lora_B": lora.B}
# Fields with the only values that are read: what else they may hold changes the arithmetic.
_FIXED = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False,
          "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
_NEWER = {"lora_bias": False, "use_qalora": False, "layer_replication": None,
          "trainable_token_indices": None}  # the same, of which older readers know nothing
# Ways to begin that change the base weights too, by the first word.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder of adapters, and how much they count."""

  folder: pathlib.Path
  scale: float = 1.0  # 0: not at all, 1: as they were trained


def save(folder, adapters: dict, config: ModelConfig, settings: lora.LoraSettings,
         base: str = "") -> None:
  """Writes adapters in float32; the folder appears when it is complete.

  All processes call this; the first one writes. FileExistsError for a folder that is not empty.

  Args:
    base: name of the weights that the adapters belong to, for the reader.
  """
  leaves = {path: _on_host(x) for path, x in names.flatten(adapters).items()}
  pending, modules = [], []
  for row in lora.target_rows(config, settings):
    modules.append(_module(row.key))
    for side, name in _SIDES.items():
      x = leaves[lora.stem(row) + name]
      pending += [Pending(_key(key, side), x.dtype, layer.shape[::-1],
                          functools.partial(np.transpose, layer))
                  for key, layer in zip(row.keys, x if row.layers else [x])]
  if jax.process_index() > 0:
    return
  pattern = "|".join(re.escape(m).replace(r"\{layer\}", r"\d+") for m in modules)
  with leases.new_folder(folder) as partial:
    write_json(partial / CONFIG, _FIXED | {
        "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": 0.0,
        "target_modules": pattern, "task_type": None, "inference_mode": True,
        "base_model_name_or_path": base})
    write_tensors(partial, STEM, pending)


def load(folder, config: ModelConfig) -> tuple[dict, float]:
  """Reads (adapters, numpy in float32, and the scale that they count by).

  Raises:
    CheckpointError: names the file and the key or field that is missing, surplus, of another shape
      than the model's matrices and the rank ask for, or of a kind of adapter that is not read.
  """
  folder = storage.path(folder)
  rank, scale = _read_config(folder / CONFIG)
  tensors = read_header(folder / FILES[1])
  wanted = {_key(key, side): (row, side) for row in lora.kernel_rows(config) for key in row.keys
            for side in _SIDES}
  found = {re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", key): tensor
           for key, tensor in tensors.items()}  # PEFT may put an adapter's name before "weight"
  path = folder / FILES[1]
  if surplus := found.keys() - wanted.keys():
    raise CheckpointError(f"{path}: {listing(surplus)}: of no matrix of this model; these adapters "
                          "belong to another one")
  rows = {row.path: row for row, _ in (wanted[key] for key in found)}
  if not rows:
    raise CheckpointError(f"{path}: holds no adapter")
  leaves = {}
  for row in rows.values():
    for side, name in _SIDES.items():
      size = row.layer_shape[0] if side == "lora_A" else row.layer_shape[-1]
      shape = (rank, size) if side == "lora_A" else (size, rank)
      parts = [_read(path, found, _key(key, side), shape) for key in row.keys]
      leaves[lora.stem(row) + name] = np.stack(parts) if row.layers else parts[0]
  return names.unflatten(leaves), scale


def _read_config(path) -> tuple[int, float]:
  fields = read_json(path)
  for name, value in (_FIXED | _NEWER).items():
    if (fields.get(name) or value) != value:
      raise CheckpointError(f"{path}: {name} is {str(fields[name])[:80]}; only {value} is read")
  if str(begin := fields.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
    raise CheckpointError(f"{path}: init_lora_weights is {str(begin)[:80]}, which changes the base "
                          "weights too; convert the adapters to plain LoRA as PEFT's docs say")
  rank, alpha = fields.get("r"), fields.get("lora_alpha")
  if type(rank) is not int or rank < 1:
    raise CheckpointError(f"{path}: r is {str(rank)[:80]}; expected a rank of at least 1")
  if type(alpha) not in (int, float) or not 0 < alpha < 1e38:
    raise CheckpointError(f"{path}: lora_alpha is {str(alpha)[:80]}; expected a number above 0")
  return rank, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _read(path, found, key, shape) -> np.ndarray:
  """One side of an adapter, transposed to ours."""
  if key not in found:
    raise CheckpointError(f"{path}: lacks {key}; an adapter has both sides in all layers")
  if found[key].shape != shape:
    raise CheckpointError(f"{path}: {key} has shape {found[key].shape}, but the model's matrix and "
                          f"r of {CONFIG} ask for {shape}")
  if found[key].stored == np.int8:
    raise CheckpointError(f"{path}: {key} is int8; adapters are read as floats: save them so")
  out = np.empty(shape, np.float32)
  found[key].read_into(out)
  return out.T


def _key(key, side) -> str:
  return f"{_PREFIX}{_module(key)}.{side}.weight"


def _module(key) -> str:
  return key.removesuffix(".weight")


def _on_host(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)  # in every process
  return np.asarray(x)
