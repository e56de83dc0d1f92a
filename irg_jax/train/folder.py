"""The folder of a run: what it was started with, and whether one may go on with it.

  run.json         settings, number of records, what training started from
  log.jsonl        a line for every step; tensorboard/ has the curves
  base/            random weights, where training did not start from a checkpoint
  STAGE/checkpoints/STEP, STAGE/weights (the moving average, in the published layout)
"""

import dataclasses
import json
import pathlib

from irg_jax import storage
from irg_jax.train.settings import STAGES, TrainSettings
from irg_jax.weights.orbax import RUN_FILE as FILE

# What may change from one start to the next, since the numbers do not depend on it, or since
# it is what one goes on for.
FREE = ("preset", "checkpoint", "run_stages", "mesh", "checkpoint_every", "keep", "log_every",
        "peak_tflops", "profile_at", "profile_steps", "data.path", "data.workers",
        "data.max_rejected", "model.remat", *(f"{stage}.steps" for stage in STAGES))


def check_folder(out, settings: TrainSettings) -> dict | None:
  """Checks that a run can be started, or gone on with, in a folder.

  Returns:
    The number of records by mode that the run was started with; None: nothing was started.

  Raises:
    ValueError: the folder holds something else, or a run with other settings.
  """
  out = pathlib.Path(out)
  storage.check_output_folder(out)
  path = out / FILE
  if not path.is_file():
    found = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if found:
      raise ValueError(f"--out {out}: holds {found[0]}, but no {FILE}, so it is not a training "
                       "run: choose another folder")
    return None
  try:
    started = json.loads(path.read_text(encoding="utf-8"))
    before, records = started["settings"], started["records"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{path}: cannot be read ({e}); restore it, or choose another --out") from e
  _check_same(before, as_json(settings), out)
  if settings.run_stages == "stage2" and (out / "stage1").is_dir():
    raise ValueError(f"--out {out}: has a stage 1, so run_stages must be both; to train stage 2 "
                     f"alone, choose another --out and --checkpoint {out / 'stage1' / 'weights'}")
  return records


def start(out, settings: TrainSettings, records: dict) -> None:
  """Makes the folder and clears what a killed process left half written."""
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  for folder in (out, *(out / stage for stage in STAGES)):
    storage.remove_partials(folder)
  base = settings.checkpoint and str(pathlib.Path(settings.checkpoint).absolute())
  storage.write_json(out / FILE, {"settings": as_json(settings), "records": records, "base": base})


def check_records(before: dict | None, records: dict, path) -> None:
  """Refuses data of another size than the run was started with.

  Raises:
    ValueError: names the mode.
  """
  for mode, count in records.items():
    if before is not None and before.get(mode, count) != count:
      raise ValueError(f"--data {path}: mode {mode} has {count} records, but the run was started "
                       f"with {before[mode]}: give the same data, or another --out")


def as_json(settings: TrainSettings) -> dict:
  """The settings as they come back from a JSON file."""
  return json.loads(json.dumps(dataclasses.asdict(settings)))


def _check_same(before, now, out, prefix=""):
  for name in sorted(before.keys() | now.keys()):
    field, a, b = prefix + name, before.get(name), now.get(name)
    if field in FREE or a == b:
      continue
    if isinstance(a, dict) and isinstance(b, dict):
      _check_same(a, b, out, field + ".")
    else:
      raise ValueError(f"--out {out}: this run was started with {field}={a}, not {b}; give "
                       f"--config.{field}={a} to go on with it, or another --out")
