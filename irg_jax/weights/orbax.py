"""Checkpoints of parameters as Orbax: `params/`, `model_config.json`, tokenizer files.

Reads faster and in parallel across hosts, and restores onto any mesh.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from irg_jax import config as config_lib
from irg_jax.config import ModelConfig
from irg_jax.storage import atomic_folder, write_json
from irg_jax.weights import names
from irg_jax.weights.errors import CheckpointError, listing
from irg_jax.weights.folders import copy_tokenizer
from irg_jax.weights.tensors import all_finite

PARAMS = "params"
CONFIG = "model_config.json"
GROUPS = 20


def read_config(folder) -> ModelConfig:
  """The configuration that the folder was saved with.

  Raises:
    CheckpointError: no such file, or not a model configuration.
  """
  path = pathlib.Path(folder) / CONFIG
  try:
    return config_lib.from_dict(json.loads(path.read_text(encoding="utf-8")))
  except FileNotFoundError:
    raise CheckpointError(f"{path}: no such file; is this an Orbax checkpoint of irg?") from None
  except (OSError, ValueError, TypeError, AttributeError) as e:
    raise CheckpointError(f"{path}: not a model configuration: {e}") from e


def save(folder, params: dict, config: ModelConfig, *, source=None) -> None:
  """Writes parameters in their own dtypes; the folder appears only when it is complete.

  Args:
    folder: must not exist, or be empty.
    source: a checkpoint folder whose tokenizer files to copy.

  Raises:
    CheckpointError: parameters that do not fit `config`.
    FileExistsError: a folder that is not empty.
  """
  names.check_params(params, config)
  with atomic_folder(folder) as partial:
    write_json(partial / CONFIG, config_lib.to_dict(config))
    copy_tokenizer(source, partial)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / PARAMS, params)


def load(folder, config: ModelConfig | None = None, *, shardings=None, dtype=None,
         part: str = "") -> dict:
  """Reads parameters; arguments and result as in `published.load`.

  Raises:
    CheckpointError: parameters that do not fit the config, are damaged or not finite.
  """
  folder = pathlib.Path(folder).absolute()
  config = config or read_config(folder)
  path = folder / PARAMS
  stored = _metadata(path)
  names.check_params(stored, config, str(path))
  wanted = names.flatten(_wanted(stored, shardings, dtype))
  return names.unflatten(restore(path, {name: x for name, x in wanted.items()
                                        if name.startswith(part)}))


def restore(path, wanted: dict) -> dict:
  """Restores some of the arrays that Orbax stored in a folder.

  Args:
    wanted: {path: ShapeDtypeStruct with a sharding}.

  Raises:
    CheckpointError: arrays that are missing, damaged or not finite.
  """
  leaves = {}
  # Group by group: Orbax holds a group several times over.
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    for group in _groups(wanted):
      item = names.unflatten({name: wanted[name] for name in group})
      how = ocp.checkpoint_utils.construct_restore_args(item)
      args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
      try:
        leaves |= names.flatten(checkpointer.restore(path, args=args))
      except Exception as e:  # Orbax and TensorStore have no common error
        raise CheckpointError(f"{path}: {listing(group)}: cannot be restored ({_first_line(e)}); "
                              "the files are damaged or incomplete") from e
  for name, x in leaves.items():
    if not _is_finite(x):
      raise CheckpointError(f"{path}: NaN or infinite numbers in {name}; the files are damaged, "
                            f"their training diverged, or {x.dtype} is too small for them")
  return leaves


def _groups(wanted):
  """Names in groups of at most 1 / `GROUPS` of all bytes, or one larger parameter.

  The largest come first, while there is room for their copies.
  """
  limit, groups, size = sum(map(_bytes, wanted.values())) / GROUPS, [[]], 0
  for name, x in sorted(wanted.items(), key=lambda item: -_bytes(item[1])):
    if groups[-1] and size + _bytes(x) > limit:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += _bytes(x)
  return groups


def _bytes(x) -> int:
  return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def _metadata(path):
  """Shapes and dtypes as stored, nested like the parameters."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(tree))
  except Exception as e:  # as above
    raise CheckpointError(f"{path}: not an Orbax checkpoint ({_first_line(e)})") from e


def _wanted(stored, shardings, dtype):
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, stored)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
                      stored, shardings)


def _is_finite(x) -> bool:
  """Looks on the host if the numbers are there, which saves a compilation for every shape."""
  shards = x.addressable_shards
  if all(s.device.platform == "cpu" for s in shards):
    return all(all_finite(np.asarray(s.data)) for s in shards if s.replica_id == 0)
  return bool(jnp.isfinite(x).all())


def _first_line(error) -> str:
  return (str(error).splitlines() or [""])[0][:200]
