"""Weights in and out: the published layout, Orbax and the checkpoints of training runs.

They are recognised by what the folder holds.
"""

import dataclasses
import pathlib

from irg_jax.config import ModelConfig
from irg_jax.storage import check_absent
from irg_jax.weights import names, orbax, published, training
from irg_jax.weights.errors import CheckpointError, listing

_MARKS = {published: "llm_config.json", orbax: orbax.CONFIG, training: training.MARK}


def load_checkpoint(folder, *, dtype=None, compute_dtype: str | None = None, shardings_fn=None,
                    part: str = ""):
  """Reads a checkpoint folder in any layout.

  Args:
    folder: published layout (`llm_config.json`, ...), Orbax (`model_config.json`, `params/`),
      or the checkpoint of a training run, whose moving average is read.
    dtype: of the parameters; None keeps each one's own.
    compute_dtype: of the arithmetic; None takes what the folder says, float32 if nothing.
    shardings_fn: from the tree of `jax.ShapeDtypeStruct` to a tree of shardings, such as
      `lambda p: sharding.parameter_shardings(p, mesh)`; None uses the default device.
    part: "transformer" or "vae" reads only that one; empty: both.

  Returns:
    (ModelConfig, {"transformer": ..., "vae": ...}).

  Raises:
    CheckpointError: what is wrong with which file and key.
  """
  layout = _layout(pathlib.Path(folder))
  config = layout.read_config(folder)
  if compute_dtype is not None:
    config = dataclasses.replace(config, dtype=compute_dtype)
  shardings = None
  if shardings_fn is not None:
    shardings = shardings_fn(names.abstract_params(config, dtype or config.param_dtype))
  return config, layout.load(folder, config, shardings=shardings, dtype=dtype, part=part)


def read_config(folder) -> ModelConfig:
  """The model's sizes, from a folder in any layout; no weights are read.

  Raises:
    CheckpointError: not a checkpoint folder, or a config that contradicts the weights.
  """
  return _layout(pathlib.Path(folder)).read_config(folder)


def convert(source, destination, to: str = "orbax", dtype=None) -> None:
  """Copies a checkpoint into the layout `to`, tokenizer included.

  Everything is read and checked before anything is written.

  Args:
    to: "orbax" or "published".
    dtype: of the parameters written; None keeps each one's own, bit for bit.

  Raises:
    CheckpointError: a source that cannot be used.
    FileExistsError: a destination that is not empty.
  """
  layouts = {"orbax": orbax, "published": published}
  if to not in layouts:
    raise ValueError(f"unknown layout {to!r}; choose one of {', '.join(layouts)}")
  check_absent(destination)
  config, params = load_checkpoint(source, dtype=dtype)
  if _layout(pathlib.Path(source)) is training:
    source = training.base_folder(source)
  layouts[to].save(destination, params, config, source=source)


def _layout(folder):
  """The module that reads `folder`."""
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder")
  for layout, mark in _MARKS.items():
    if (folder / mark).is_file():
      return layout
  found = listing((p.name for p in folder.iterdir()), limit=8) or "nothing"
  raise CheckpointError(
      f"{folder}: not a checkpoint; expected the published layout (llm_config.json, "
      "vit_config.json, ema.safetensors, ae.safetensors), Orbax (model_config.json, params/) or "
      "the checkpoint of a training run (RUN/STAGE/checkpoints/STEP), "
      f"found {found}")
