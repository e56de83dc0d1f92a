"""Orbax checkpoints: of parameters, and the moving average of a training run's checkpoint.

Parameters are `params/`, `model_config.json` and tokenizer files. They are read faster than the
published layout, in parallel across hosts, and onto any mesh. A training run's checkpoint,
RUN/STAGE/checkpoints/STEP, is only read: the VAE, the sizes and the tokenizer come from what the
run started from.
"""

import dataclasses
import functools
import importlib
import logging
import math
import os
import pathlib
import re
import sys
import warnings

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from irg_jax import config as config_lib
from irg_jax import leases, storage
from irg_jax.config import ModelConfig
from irg_jax.messages import message
from irg_jax.sharding import to_host
from irg_jax.storage import read_json, write_json
from irg_jax.weights import int8, lora, names
from irg_jax.weights.configs import copy_tokenizer
from irg_jax.weights.names import CheckpointError, in_groups, listing
from irg_jax.weights.safetensors import all_finite

PARAMS = "params"
CONFIG = "model_config.json"
# A folder that cannot be made in the background is waited for, 300 s long.
FOLDERS_FIRST = {"create_directories_asynchronously": False}
_WITH_S3 = "0.12.8"  # a version of Orbax that `_know_s3` fits
GROUPS = 20  # `restore` reads 1 / GROUPS of all bytes at a time; Orbax holds several copies of it

RUN_FILE = "run.json"  # in the folder of a training run
BASE = "base"  # likewise, if it started from random weights


@dataclasses.dataclass(frozen=True)
class Run:
  """The weights' part of a training run's record."""

  model: ModelConfig
  base: pathlib.Path  # folder that it started from
  fingerprint: str | None  # of that folder, see `weights.fingerprint`; None: not recorded
  lora: lora.LoraSettings  # its adapters, of a rank of 0 where it trains the weights themselves


def read_config(folder) -> ModelConfig:
  """Reads the configuration that the folder was saved with; CheckpointError without one."""
  path = storage.path(folder) / CONFIG
  try:
    return config_lib.build(ModelConfig, read_json(path))
  except FileNotFoundError:
    raise CheckpointError(f"{path}: no such file; is this an Orbax checkpoint of irg?") from None
  except (OSError, ValueError) as e:
    raise CheckpointError(f"{path}: not a model configuration: {e}") from e


def save(folder, params: dict, config: ModelConfig, *, source=None) -> None:
  """Writes parameters in their own dtypes; the folder appears when it is complete.

  Tokenizer files of the checkpoint folder `source` are copied. Raises CheckpointError if
  parameters do not fit `config`, FileExistsError for a folder that is not empty.
  """
  names.check_params(params, config)
  know_store(folder)
  with leases.new_folder(folder) as partial:
    write_json(partial / CONFIG, dataclasses.asdict(config))
    copy_tokenizer(source, partial)
    quiet()
    try:
      with ocp.StandardCheckpointer(
          async_options=ocp.options.AsyncOptions(**FOLDERS_FIRST)) as checkpointer:
        checkpointer.save(partial / PARAMS, params)
    except Exception as e:  # Orbax and TensorStore have no common error
      raise OSError(f"{folder}: cannot be written ({reason(e)})") from e


def load(folder, config: ModelConfig | None = None, *, shardings=None, dtype=None,
         part: str = "", form: int8.Form = int8.Form()) -> dict:
  """Reads parameters; arguments, result and errors as of `published.load`."""
  folder = storage.path(folder).absolute()
  config = config or read_config(folder)
  path = folder / PARAMS
  leaves = names.check_params(_stored(path), config, str(path))
  whole = {name: x.dtype == np.int8 for name, x in leaves.items() if name.startswith(part)}
  placed = names.flatten(shardings) if shardings else dict.fromkeys(whole)
  scales = {int8.paths(name)[1]: name for name in whole if whole[name]}
  found = restore(path, {name: _placed(leaves[name], int8.scale_sharding(placed[kernel]))
                         for name, kernel in scales.items()})
  for name, x in found.items():
    int8.check_scales(to_host(x), f"{path}: {name}")

  def finish(name, x):
    scale = found.get(int8.paths(name)[1])
    if form.keeps(name, whole[name]):
      return dict(zip(int8.paths(name), (x, scale)))
    if whole[name]:
      x = int8.dequantize(x, scale, dtype or jnp.bfloat16)
    return form.finish(name, x, whole[name])

  own = lambda name: whole[name] or form.quantizes(name, whole[name])
  wanted = {name: _placed(leaves[name], placed[name], None if own(name) else dtype)
            for name in whole if name not in scales}
  return names.unflatten(restore(path, wanted, finish))


def is_int8(folder) -> bool:
  """Whether matrices of an Orbax folder are int8."""
  return any(x.dtype == np.int8 for x in
             names.flatten(_stored(storage.path(folder).absolute() / PARAMS)).values())


def _stored(path) -> dict:
  """Shapes and dtypes of the parameters in a folder; CheckpointError."""
  know_store(path)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(tree))
  except Exception as e:  # as in `restore`
    raise CheckpointError(f"{path}: not an Orbax checkpoint ({reason(e)})") from e


def read_run_config(folder) -> ModelConfig:
  """Reads the model's sizes of a training run from the folder of one of its checkpoints."""
  return read_run(folder).model


def base_folder(folder) -> pathlib.Path:
  """The checkpoint that a training run started from; `folder` as of `read_run_config`."""
  return read_run(folder).base


def load_adapters(folder) -> dict:
  """Reads the moving average of the adapters of a run's checkpoint, numpy in float32."""
  run, path = read_run(folder), storage.path(folder).absolute() / "state"
  wanted = names.flatten({"ema": lora.abstract_adapters(run.model, run.lora)})
  found = restore(path, {name: _placed(x) for name, x in wanted.items()})
  found = names.unflatten(found)["ema"]
  return jax.tree.map(np.asarray, found)


def load_average(folder, config: ModelConfig | None = None, *, shardings=None,
                 dtype=None, form: int8.Form = int8.Form()) -> dict:
  """Reads the moving average of a run's checkpoint: {"transformer": ...}; see `load`."""
  config = config or read_run_config(folder)
  shapes = names.flatten({"transformer": names.abstract_params(config, np.float32)["transformer"]})
  placed = names.flatten(shardings) if shardings else dict.fromkeys(shapes)
  wanted = {name.replace("transformer", "ema", 1): _placed(
      x, placed[name], None if form.quantizes(name, False) else dtype)
            for name, x in shapes.items()}
  return names.unflatten(restore(
      storage.path(folder).absolute() / "state", wanted,
      lambda name, x: form.finish(name.replace("ema", "transformer", 1), x)))


def restore(path, wanted: dict, finish=None) -> dict:
  """Restores some arrays of a folder, {path: ShapeDtypeStruct with sharding} -> {path: array}.

  `finish` is a function (path, array) -> {path: array}, called before the next arrays are read.
  Raises CheckpointError for arrays that are missing, damaged or not finite.
  """
  know_store(path)
  leaves = {}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    size = {name: math.prod(x.shape) * np.dtype(x.dtype).itemsize for name, x in wanted.items()}
    for group in filter(None, in_groups(sorted(size, key=size.get, reverse=True), size.get,
                                        sum(size.values()) / GROUPS)):
      item = names.unflatten({name: wanted[name] for name in group})
      how = ocp.checkpoint_utils.construct_restore_args(item)
      args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
      try:
        found = names.flatten(checkpointer.restore(path, args=args))
      except Exception as e:  # Orbax and TensorStore have no common error
        raise CheckpointError(f"{path}: {listing(group)}: cannot be restored ({reason(e)}); "
                              "the files are damaged or incomplete") from e
      for name in list(found):
        x = found.pop(name)
        if not _is_finite(x):
          raise CheckpointError(
              f"{path}: NaN or infinite numbers in {name}; the files are damaged, their training "
              f"diverged, or {x.dtype} is too small for them")
        leaves |= finish(name, x) if finish else {name: x}
  return leaves


def _placed(x, sharding=None, dtype=None):
  """A shape with a sharding (None: the default device) and a dtype (None: its own)."""
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)


def _is_finite(x) -> bool:
  """Checks on the host if the numbers are there, which saves a compilation for every shape."""
  if all(device.platform == "cpu" for device in x.sharding.addressable_devices):
    return all(all_finite(np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0)
  return bool(jnp.isfinite(x).all())


def quiet() -> None:
  """Keeps Orbax from printing a traceback for each array that a failed save left unwritten.

  The first of these errors is raised, too.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  if getattr(sys.unraisablehook, "func", None) is not _show_unless_closed:
    sys.unraisablehook = functools.partial(_show_unless_closed, sys.unraisablehook)


def _show_unless_closed(show, unraisable):
  if str(unraisable.exc_value) != "Event loop is closed":  # TensorStore's, of each array
    show(unraisable)


def know_store(path) -> None:
  """Readies Orbax for a path; ValueError for one in s3:// with a version that cannot be readied."""
  if str(path).startswith("s3://"):
    _know_s3()


@functools.cache
def _know_s3():
  """Gives arrays in s3:// to TensorStore's driver; Orbax itself knows that of gs:// alone.

  There is no public way. Like s3fs, it follows AWS_ENDPOINT_URL, and then needs a region.
  """
  try:
    paths = importlib.import_module("orbax.checkpoint._src.path.gcs_utils")
    arrays = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
    normal, is_known, spec = (
        arrays._normalize_path, arrays._use_gcs_driver, paths.get_kvstore_for_gcs)
  except (ImportError, AttributeError) as e:
    raise ValueError(f"Orbax {ocp.__version__} cannot keep checkpoints in s3:// ({e}); pip install "
                     f"'orbax-checkpoint=={_WITH_S3}', or use another store") from e

  def of_s3(path):
    if not path.startswith("s3://"):
      return spec(path)
    bucket, _, key = path.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    where = {"endpoint": endpoint, "aws_region": region} if endpoint else {}
    return {"driver": "s3", "bucket": bucket, "path": key, **where}

  arrays._normalize_path = lambda path: re.sub("^s3:/+", "s3://", normal(path))
  arrays._use_gcs_driver = lambda path: path.startswith("s3://") or is_known(path)
  paths.get_kvstore_for_gcs = of_s3


def reason(error) -> str:
  """The system's words for an error with its number, else the first line.

  A long line loses its middle: the cause comes last.
  """
  if number := re.search(r"os_error_code='(\d+)'", str(error)):  # of TensorStore
    *_, path = re.findall(r'"(/[^"]*)"', str(error)) or [None]
    error = OSError(int(number[1]), os.strerror(int(number[1])), path)
  lines = [line for line in message(error).splitlines() if line.strip()]
  line = (lines or [type(error).__name__])[0]
  return line if len(line) <= 300 else f"{line[:100]} ... {line[-190:]}"


def read_run(folder) -> Run:
  """Reads the record of a training run; `folder` as of `read_run_config`."""
  path = storage.path(folder).absolute().parents[2] / RUN_FILE
  try:
    run = read_json(path)
    return Run(config_lib.build(ModelConfig, run["settings"]["model"]),
               storage.path(run["base"] or path.with_name(BASE)), run.get("fingerprint"),
               config_lib.build(lora.LoraSettings, run["settings"].get("lora", {})))
  except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
    raise CheckpointError(f"{folder}: a training checkpoint is read inside its run's folder, but "
                          f"{path} cannot be read ({e})") from e
