"""Checkpoints: the published layout, Orbax, and the checkpoints of training runs.

The layout of a folder is recognised by the files in it.
"""

import dataclasses
import functools
import hashlib
import importlib
import re

from irg_jax import leases, storage
from irg_jax.config import ModelConfig, VaeConfig
from irg_jax.weights import card as cards
from irg_jax.weights import configs, int8, names, peft, published
from irg_jax.weights.names import CheckpointError, listing

_SCORES, _SAMPLE = "scores.json", 2**20  # see `fingerprint`
# Lines of generate.json that change no image of a fixed number of rounds: copies from before they
# came count as the same.
_SATISFIED = re.compile(rb'\n *"(?:satisfied": |until_satisfied": false)[^\n]*')
_RUN_MARK = "_CHECKPOINT_METADATA"  # written by Orbax into each checkpoint of a training run


def _orbax(name: str):
  """A function of `weights.orbax`, which is imported when it is called: that takes its time."""
  module = "irg_jax.weights.orbax"
  return lambda *args, **options: getattr(importlib.import_module(module), name)(*args, **options)


# File that marks a layout -> functions that read its configuration and its parameters.
_READERS = {
    "llm_config.json": (published.read_config, published.load),
    "model_config.json": (_orbax("read_config"), _orbax("load")),
    _RUN_MARK: (_orbax("read_run_config"), lambda *args, **how: _load_run(*args, **how)),
}


def load_checkpoint(folder, *, dtype=None, compute_dtype: str | None = None, shardings_fn=None,
                    part: str = "", adapters: peft.Source | None = None,
                    weights: str | None = None, merges=()):
  """Reads a checkpoint folder in any layout.

  Args:
    folder: published layout (`llm_config.json`, ...), Orbax (`model_config.json`, `params/`),
      or the checkpoint of a training run, whose moving average is read.
    dtype: of the parameters that are not int8; None: each one's own.
    compute_dtype: of the arithmetic; None: as the folder says, float32 if it says nothing.
    shardings_fn: from the tree of `jax.ShapeDtypeStruct` to a tree of shardings, for example
      `lambda p: sharding.parameter_shardings(p, mesh)`; None uses the default device.
    part: "transformer" or "vae" reads only that one; empty: both.
    adapters: merged into the weights.
    weights, merges: as of `int8.Form`; `adapters` are merged last.

  Returns:
    (ModelConfig, {"transformer": ..., "vae": ...}). CheckpointError names the file and key.
  """
  folder, shardings, form = storage.path(folder), None, int8.Form(weights, tuple(merges))
  config = read_config(folder)
  if compute_dtype is not None:
    config = dataclasses.replace(config, dtype=compute_dtype)
  if shardings_fn is not None:
    shardings = shardings_fn(names.abstract_params(config, dtype or config.param_dtype))
  if adapters is not None and part != "vae":
    found, scale = peft.load(adapters.folder, config)
    form = form.merging(found, adapters.scale * scale)
  return config, _load(folder, config, shardings=shardings, dtype=dtype, part=part, form=form)


def load_autoencoder(folder, dtype=None) -> tuple[VaeConfig, dict]:
  """Reads the autoencoder of a checkpoint, or of a folder with its two published files alone.

  `dtype` is as of `load_checkpoint`. Returns (sizes, parameters); CheckpointError as there.
  """
  folder = storage.path(folder)
  alone = storage.is_there(folder / "ae.safetensors") and not any(
      storage.is_there(folder / mark) for mark in _READERS)
  if not alone:
    config, params = load_checkpoint(folder, dtype=dtype, part="vae")
    return config.vae, params["vae"]
  config = ModelConfig(vae=configs.read_vae(folder))  # sizes of what is not read do not matter
  return config.vae, published.load(folder, config, dtype=dtype, part="vae")["vae"]


def _load(folder, config, **how):
  return _READERS[_mark(folder)][1](folder, config, **how)


def _load_run(folder, config, *, shardings, dtype, part, form):
  """The moving average of a run's checkpoint; what the run did not train is that of its base."""
  run, params = _orbax("read_run")(folder), {}
  how = dict(shardings=shardings, dtype=dtype)
  if run.lora.rank:
    check_fingerprint(run.base, run.fingerprint, folder)
    if part != "vae":
      own = _orbax("load_adapters")(folder), run.lora.scale
      form = dataclasses.replace(form, merges=(own, *form.merges))
    return _load(run.base, config, part=part, form=form, **how)
  if part != "transformer":
    params = _load(run.base, config, part="vae", form=form, **how)
  return params if part == "vae" else params | _orbax("load_average")(
      folder, config, form=form, **how)


def is_int8(folder) -> bool:
  """Whether matrices of a checkpoint folder are int8; reads no weights."""
  folder = storage.path(folder)
  mark = _mark(folder)
  if mark == _RUN_MARK:
    run = _orbax("read_run")(folder)
    return bool(run.lora.rank) and is_int8(run.base)
  return published.is_int8(folder) if mark == "llm_config.json" else _orbax("is_int8")(folder)


def read_config(folder) -> ModelConfig:
  """Reads the model's sizes, and no weights, from a folder in any layout; CheckpointError."""
  return _READERS[_mark(storage.path(folder))][0](folder)


def convert(source, destination, to: str = "orbax", dtype=None, card: bool = False,
            adapters: peft.Source | None = None) -> None:
  """Copies a checkpoint, tokenizer included, into the layout `to`.

  Everything is read and checked before anything is written. Raises CheckpointError for a source
  that cannot be used, FileExistsError for a destination that is not empty.

  Args:
    to: "orbax", "published", or "peft" for the adapters alone of a training run's checkpoint.
    dtype: of the parameters written; None: each one's own, bit for bit. "int8": matrices of layers
      become int8 with scales, the others stay as they are; int8 ones become any other dtype.
    card: writes a model card, README.md, as well.
    adapters: merged into the weights.
  """
  save = {"orbax": _orbax("save"), "published": published.save, "peft": None}
  if to not in save:
    raise ValueError(f"unknown layout {to!r}; choose one of {', '.join(save)}")
  leases.check_new(destination)
  if to == "peft":
    return _convert_adapters(source, destination)
  weights, dtype = ("int8", None) if dtype == "int8" else (dtype and "float", dtype)
  config, params = load_checkpoint(source, dtype=dtype, adapters=adapters, weights=weights)
  run = None
  if _mark(storage.path(source)) == _RUN_MARK:
    run = storage.path(source).absolute().parents[2] / "run.json"
    source = _orbax("base_folder")(source)
  save[to](destination, params, config, source=source)
  if card:
    cards.write(destination, config, "int8 with scales, others their own" if weights == "int8" else
                dtype, run)


def needed(files) -> list[str]:
  """Names of those files of a repository that belong to its checkpoint; empty without one."""
  if "model_config.json" in files:  # Orbax
    return [name for name in files if not name.startswith(".")]
  if "llm_config.json" not in files:
    return []
  averaged = any(re.fullmatch(r"ema\.safetensors(\.index\.json)?", f) for f in files)
  stem = "ema" if averaged else "model"
  weights = rf"({stem}|ae)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|vit\.safetensors"
  return [name for name in files if name in configs.NAMES + configs.TOKENIZER_FILES
          or re.fullmatch(weights, name)]


def _convert_adapters(source, destination):
  run = _orbax("read_run")(source) if _mark(storage.path(source)) == _RUN_MARK else None
  if run is None or not run.lora.rank:
    raise CheckpointError(f"{source}: holds no adapters; expected the checkpoint of a training run "
                          "with lora.rank above 0 (RUN/STAGE/checkpoints/STEP)")
  peft.save(destination, _orbax("load_adapters")(source), run.model, run.lora, str(run.base))


def check_fingerprint(base, recorded: str | None, whose) -> None:
  """Raises CheckpointError unless `base` is the checkpoint that adapters were trained on."""
  if recorded not in (None, found := fingerprint(base)):
    raise CheckpointError(f"{base}: has the fingerprint {found}, but the adapters in {whose} were "
                          f"trained on weights with {recorded}; put those back")


def fingerprint(folder, adapters: peft.Source | None = None, weights: str | None = None) -> str:
  """Digest of a checkpoint: every file's name, size, and first, middle and last MiB.

  Copies agree; another layout of the same weights does not. Scores beside the weights do not count.
  `adapters` that are merged into the weights do, as does `weights`, see `load_checkpoint`.
  """
  folder, digest = storage.path(folder), hashlib.sha256()
  if adapters is not None:
    digest.update(f"{fingerprint(adapters.folder)} {adapters.scale}\n".encode())
  if weights is not None:
    digest.update(f"weights {weights}\n".encode())
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder)
    weighs = path.suffix in (".json", ".txt", ".safetensors") and path.name != _SCORES
    hidden = any(part.startswith(".") for part in name.parts)
    if path.is_file() and not hidden and (weighs or len(name.parts) > 1):
      size, part = path.stat().st_size, functools.partial(storage.read_range, path)
      if path.name == "generate.json":
        kept = _SATISFIED.sub(b"", storage.read_file(path))
        size, part = len(kept), lambda start, stop: kept[start:stop]
      digest.update(f"{name.as_posix()} {size}\n".encode())
      for start in (max(0, x) for x in (0, (size - _SAMPLE) // 2, size - _SAMPLE)):
        digest.update(part(start, min(size, start + _SAMPLE)))
  return digest.hexdigest()[:16]


def _mark(folder):
  """The file that says which layout `folder` has."""
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder")
  try:
    leases.check_finished(folder)
  except ValueError as e:
    raise CheckpointError(str(e)) from e
  for mark in _READERS:
    if (folder / mark).is_file():
      return mark
  raise CheckpointError(
      f"{folder}: not a checkpoint; expected the published layout (llm_config.json, "
      "vit_config.json, ema.safetensors, ae.safetensors), Orbax (model_config.json, params/) or "
      "the checkpoint of a training run (RUN/STAGE/checkpoints/STEP), found "
      f"{listing((p.name for p in folder.iterdir()), limit=8) or 'nothing'}")
