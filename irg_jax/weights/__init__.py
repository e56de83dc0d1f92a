"""Checkpoints: the published layout, Orbax, and the checkpoints of training runs.

The layout of a folder is recognised by the files in it.
"""

import dataclasses
import hashlib
import importlib
import pathlib
import re

from irg_jax.config import ModelConfig
from irg_jax.storage import check_absent
from irg_jax.weights import card as cards
from irg_jax.weights import configs, names, published
from irg_jax.weights.names import CheckpointError, listing

_SCORES, _SAMPLE = "scores.json", 2**20  # see `fingerprint`
_RUN_MARK = "_CHECKPOINT_METADATA"  # written by Orbax into each checkpoint of a training run


def _orbax(name: str):
  """A function of `weights.orbax`, which is imported when it is called: that takes its time."""
  module = "irg_jax.weights.orbax"
  return lambda *args, **options: getattr(importlib.import_module(module), name)(*args, **options)


# File that marks a layout -> functions that read its configuration and its parameters.
_READERS = {
    "llm_config.json": (published.read_config, published.load),
    "model_config.json": (_orbax("read_config"), _orbax("load")),
    _RUN_MARK: (_orbax("read_run_config"), _orbax("load_average")),
}


def load_checkpoint(folder, *, dtype=None, compute_dtype: str | None = None, shardings_fn=None,
                    part: str = ""):
  """Reads a checkpoint folder in any layout.

  Args:
    folder: published layout (`llm_config.json`, ...), Orbax (`model_config.json`, `params/`),
      or the checkpoint of a training run, whose moving average is read.
    dtype: of the parameters; None: each one's own.
    compute_dtype: of the arithmetic; None: as the folder says, float32 if it says nothing.
    shardings_fn: from the tree of `jax.ShapeDtypeStruct` to a tree of shardings, for example
      `lambda p: sharding.parameter_shardings(p, mesh)`; None uses the default device.
    part: "transformer" or "vae" reads only that one; empty: both.

  Returns:
    (ModelConfig, {"transformer": ..., "vae": ...}). CheckpointError names the file and key.
  """
  mark = _mark(pathlib.Path(folder))
  read, load = _READERS[mark]
  config = read(folder)
  if compute_dtype is not None:
    config = dataclasses.replace(config, dtype=compute_dtype)
  shardings, params = None, {}
  if shardings_fn is not None:
    shardings = shardings_fn(names.abstract_params(config, dtype or config.param_dtype))
  if mark == _RUN_MARK and part != "transformer":  # a run trains no VAE and saves none
    _, params = load_checkpoint(_orbax("base_folder")(folder), dtype=dtype, part="vae",
                                shardings_fn=shardings_fn and (lambda _: shardings))
  if mark != _RUN_MARK or part != "vae":
    params = load(folder, config, shardings=shardings, dtype=dtype, part=part) | params
  return config, params


def read_config(folder) -> ModelConfig:
  """Reads the model's sizes, and no weights, from a folder in any layout; CheckpointError."""
  return _READERS[_mark(pathlib.Path(folder))][0](folder)


def convert(source, destination, to: str = "orbax", dtype=None, card: bool = False) -> None:
  """Copies a checkpoint, tokenizer included, into the layout `to`.

  Everything is read and checked before anything is written. Raises CheckpointError for a source
  that cannot be used, FileExistsError for a destination that is not empty.

  Args:
    to: "orbax" or "published".
    dtype: of the parameters written; None: each one's own, bit for bit.
    card: writes a model card, README.md, as well.
  """
  save = {"orbax": _orbax("save"), "published": published.save}
  if to not in save:
    raise ValueError(f"unknown layout {to!r}; choose one of {', '.join(save)}")
  check_absent(destination)
  config, params = load_checkpoint(source, dtype=dtype)
  run = None
  if _mark(pathlib.Path(source)) == _RUN_MARK:
    run = pathlib.Path(source).absolute().parents[2] / "run.json"
    source = _orbax("base_folder")(source)
  save[to](destination, params, config, source=source)
  if card:
    cards.write(destination, config, dtype, run)


def needed(files) -> list[str]:
  """Names of those files of a repository that belong to its checkpoint; empty without one."""
  if "model_config.json" in files:  # Orbax
    return [name for name in files if not name.startswith(".")]
  if "llm_config.json" not in files:
    return []
  stem = "ema" if any(re.fullmatch(r"ema\.safetensors(\.index\.json)?", f) for f in files) else "model"
  weights = rf"({stem}|ae)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|vit\.safetensors"
  return [name for name in files if name in configs.NAMES + configs.TOKENIZER_FILES
          or re.fullmatch(weights, name)]


def fingerprint(folder) -> str:
  """Digest of a checkpoint: every file's name, size, and first, middle and last MiB.

  Copies agree; another layout of the same weights does not. Scores beside the weights do not count.
  """
  folder, digest = pathlib.Path(folder), hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder)
    weighs = path.suffix in (".json", ".txt", ".safetensors") and path.name != _SCORES
    hidden = any(part.startswith(".") for part in name.parts)
    if path.is_file() and not hidden and (weighs or len(name.parts) > 1):
      size = path.stat().st_size
      digest.update(f"{name.as_posix()} {size}\n".encode())
      with path.open("rb") as f:
        for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
          f.seek(max(0, start))
          digest.update(f.read(_SAMPLE))
  return digest.hexdigest()[:16]


def _mark(folder):
  """The file that says which layout `folder` has."""
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder")
  for mark in _READERS:
    if (folder / mark).is_file():
      return mark
  raise CheckpointError(
      f"{folder}: not a checkpoint; expected the published layout (llm_config.json, "
      "vit_config.json, ema.safetensors, ae.safetensors), Orbax (model_config.json, params/) or "
      "the checkpoint of a training run (RUN/STAGE/checkpoints/STEP), found "
      f"{listing((p.name for p in folder.iterdir()), limit=8) or 'nothing'}")
