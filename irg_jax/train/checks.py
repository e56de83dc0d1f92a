"""Checks before a run starts or continues: its folder, its data, its base weights."""

import dataclasses
import pathlib

from irg_jax import config, runs, storage, weights
from irg_jax.data import sources as sources_lib
from irg_jax.train.distributed import note
from irg_jax.train.settings import ADDED, GONE, STAGES, TrainSettings
from irg_jax.weights.lora import LoraSettings
from irg_jax.weights.orbax import RUN_FILE

# Settings that may change when a run is continued: the numbers do not depend on them, or they
# say how far to train.
FREE = ("checkpoint", "random_weights", "run_stages", "mesh", "checkpoint_every", "keep",
        "log_every", "eval_every", "watch", "wandb", "profile_at", "data.path", "data.workers",
        "data.max_rejected", "model.remat", "model.attention",
        *(f"{stage}.steps" for stage in STAGES), *GONE)


def check_folder(out: pathlib.Path, settings: TrainSettings) -> dict:
  """Checks that a run can be started or continued in a folder.

  Returns:
    The record of the run; {} for a new one.

  Raises:
    ValueError: the folder holds something else, or a run with other settings.
  """
  storage.check_output_folder(out)
  runs.check_folder(out / RUN_FILE, "a training run")
  if not (out / RUN_FILE).is_file():
    return {}
  record = runs.read(out / RUN_FILE, ("settings", "records"))
  # Runs that are older than adapters have none.
  before = ADDED | {"lora": dataclasses.asdict(LoraSettings())} | record["settings"]
  runs.check_same(before, dataclasses.asdict(settings), f"--out {out}",
                  flag="--config.", free=FREE, renamed=config.renamed(TrainSettings))
  if settings.run_stages == "stage2" and (out / "stage1").is_dir():
    raise ValueError(f"--out {out}: has a stage 1, so run_stages must be both; to train stage 2 "
                     f"alone, choose another --out and --checkpoint {out / 'stage1' / 'weights'}")
  return record


def check_data(path, sources: dict, recorded: dict) -> dict:
  """Checks that the data are those of the run's record, {} for a new run; ValueError names a mode.

  Returns:
    "records" and "sources" of the new record: number and `sources.fingerprint` by mode.
  """
  records = {mode: len(source) for mode, source in sources.items()}
  counted, known = recorded.get("records", {}), recorded.get("sources", {})
  runs.check_same({"records": {mode: counted.get(mode, n) for mode, n in records.items()}},
                  {"records": records}, f"--data {path}")
  prints = {mode: sources_lib.fingerprint(source) for mode, source in sources.items()}
  if other := [mode for mode in prints if known.get(mode, prints[mode]) != prints[mode]]:
    raise ValueError(f"--data {path}: {other[0]} holds other rows than those that the run was "
                     "started with; give the run's own data, or choose another --out")
  if counted and not known:
    note("the run's record is older than the check that its data stay the same; from now on they "
         "are checked")
  return {"records": counted | records, "sources": known | prints}


def check_base(settings: TrainSettings, recorded: dict) -> str | None:
  """Refuses weights of another model or of int8, and random ones unless the settings ask for them.

  Also refuses other weights than those that the adapters of the run in `recorded`, {} for a new
  one, belong to. Returns the fingerprint of the weights; None for random ones.
  """
  if not settings.checkpoint:
    if not settings.random_weights:
      raise ValueError("training starts from trained weights: give --checkpoint DIR, or "
                       "--config.random_weights=true")
    return None
  theirs = weights.read_config(settings.checkpoint)
  for part in ("llm", "vit", "vae", "max_latent_size", "latent_patch_size"):
    wanted, found = getattr(settings.model, part), getattr(theirs, part)
    if wanted != found:
      raise ValueError(f"config field 'model.{part}' is {wanted}, but the weights in "
                       f"{settings.checkpoint} have {found}")
  if not settings.lora.rank and weights.is_int8(settings.checkpoint):
    raise ValueError(f"--checkpoint {settings.checkpoint}: its weights are int8, and an update "
                     "is far less than one of their steps; give the weights that they were made "
                     "from, or train adapters beside them (--config.lora.rank=16)")
  found, known = weights.fingerprint(settings.checkpoint), recorded.get("fingerprint")
  if settings.lora.rank and known not in (None, found):
    raise ValueError(f"--checkpoint {settings.checkpoint}: has the fingerprint {found}, but the "
                     f"run's adapters belong to {recorded['base']} with {known}; give a copy of "
                     "that, or choose another --out")
  return found
