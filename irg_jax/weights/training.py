"""The moving average of a training run's checkpoint, RUN/STAGE/checkpoints/STEP; read only.

The autoencoder, the sizes and the tokenizer come from what the run started from.
"""

import json
import pathlib

import jax
import numpy as np

from irg_jax import config as config_lib
from irg_jax.config import ModelConfig
from irg_jax.weights import names, orbax
from irg_jax.weights.errors import CheckpointError

MARK = "_CHECKPOINT_METADATA"  # Orbax puts it into each
RUN_FILE = "run.json"
BASE = "base"  # in the folder of a run that started from random weights


def read_config(folder) -> ModelConfig:
  """The sizes of the run's model.

  Raises:
    CheckpointError: the folder is not inside that of a training run.
  """
  settings, _ = _read_run(folder)
  return config_lib.from_dict(settings["model"])


def base_folder(folder) -> pathlib.Path:
  """The checkpoint that the run started from."""
  return _read_run(folder)[1]


def load(folder, config: ModelConfig | None = None, *, shardings=None, dtype=None,
         part: str = "") -> dict:
  """Reads parameters; arguments and result as in `published.load`."""
  from irg_jax import weights  # it imports this file
  folder = pathlib.Path(folder).absolute()
  config = config or read_config(folder)
  params = {}
  if part in ("", "transformer"):
    params["transformer"] = _load_average(folder, config, shardings, dtype)
  if part in ("", "vae"):
    place = None if shardings is None else lambda _: shardings
    params |= weights.load_checkpoint(base_folder(folder), dtype=dtype, shardings_fn=place,
                                      part="vae")[1]
  return params


def _load_average(folder, config, shardings, dtype):
  shapes = names.abstract_params(config, np.dtype(dtype or np.float32))["transformer"]
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda _: device, shapes)
  else:
    placed = shardings["transformer"]
  wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        shapes, placed)
  return names.unflatten(orbax.restore(folder / "state", names.flatten({"ema": wanted})))["ema"]


def _read_run(folder):
  """(settings as JSON, folder that the run started from)."""
  path = pathlib.Path(folder).absolute().parents[2] / RUN_FILE
  try:
    run = json.loads(path.read_text(encoding="utf-8"))
    return run["settings"], pathlib.Path(run["base"] or path.with_name(BASE))
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise CheckpointError(f"{folder}: a training checkpoint is read inside its run's folder, but "
                          f"{path} cannot be read ({e})") from e
