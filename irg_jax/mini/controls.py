"""Controls of a finished run: arms that lack one thing, and other seeds.

  OUT/withoutN/stage2/weights     the run's stages without one mode of data, as many updates
  OUT/evaluation/blind/...        second thoughts that were written without the first image
  OUT/seeds/N/...                 a run from the same base model, with the run's seed + N
  OUT/report/...                  the report with all of these arms

The arms and their titles are in files/report.toml. "better pictures only", which is a part of the
run, is the control without interleaving.
"""

import dataclasses
import pathlib

from irg_jax import runs
from irg_jax.mini import report, run
from irg_jax.mini.arms import ALL, CONTROLS, FINAL
from irg_jax.train.settings import STAGES
from irg_jax.weights.orbax import RUN_FILE


def run_controls(settings: run.Settings, out, seeds: int = 3) -> int:
  """Trains and draws the controls of the run in `out` that are missing, then reports.

  `seeds` is the number of seeds of training, with the run's own. Returns the exit status: 0, or
  that of a training that was asked to stop. ValueError as of `run.check_same`, or where the run is
  not finished.
  """
  out = pathlib.Path(out)
  if not (out / FINAL.weights).is_dir():
    raise ValueError(f"--out {out}: no finished run in there to control; make one with irg mini "
                     f"run --out {out}")
  run.check_same(settings, out)
  check_length(settings, out)
  for arm in CONTROLS:
    if arm.without:
      print(f"irg mini: {arm.title}", flush=True)
      if status := run.train_irgl(settings, out, name=arm.name, without=arm.without):
        return status
  base = str(run.base_weights(out).absolute())
  for number in range(1, seeds):
    print(f"irg mini: seed {settings.seed + number}", flush=True)
    again = dataclasses.replace(settings, seed=settings.seed + number, base=base, autoencoder="")
    if status := run.run(again, out / "seeds" / str(number)):
      return status
  print(f"irg mini: wrote {report.run(out, ALL)}")
  return 0


def check_length(settings: run.Settings, out: pathlib.Path) -> None:
  """Raises ValueError where the preset's two stages are no longer those of the run in `out`."""
  now = run.training(settings, out, "irgl")
  recorded = runs.read(out / "irgl" / RUN_FILE, ("settings",))["settings"]
  for stage in STAGES:
    steps = recorded[stage]["steps"], now.stages[stage].steps
    if steps[0] != steps[1]:
      raise ValueError(f"--out {out}: {stage} of this run has {steps[0]} updates, but "
                       f"{settings.config} says {steps[1]}, so its controls would not be matched; "
                       f"give --config.train=\"('{stage}.steps={steps[0]}',)\" as the run did, or "
                       "the file that it was made with")
