"""One `irg train`, from settings to exported weights: the story of a run, top to bottom."""

import pathlib
import sys

import jax
import numpy as np

from irg_jax import config as config_lib
from irg_jax import sharding, weights
from irg_jax.data import sources as sources_lib
from irg_jax.data.latents import Encoder
from irg_jax.data.records import MODES
from irg_jax.progress import Progress
from irg_jax.train import folder
from irg_jax.train.checkpoints import steps_in
from irg_jax.train.feed import row_block
from irg_jax.train.preemption import EXIT_STATUS, Preemption
from irg_jax.train.processes import meet
from irg_jax.train.settings import TrainSettings
from irg_jax.train.stage import Run, counts, rejected, train_stage
from irg_jax.weights import init, published
from irg_jax.weights.orbax import BASE
from irg_jax.tokenizer import load_tokenizer

RANDOM_PRESETS = ("tiny",)  # small enough that random weights are meant


def run_train(settings: TrainSettings, out) -> int:
  """Trains the stages that are asked for, or what is left of them.

  Args:
    out: folder of the run; one that holds a run is gone on with.

  Returns:
    The exit status: 0, or `preemption.EXIT_STATUS` after SIGTERM.

  Raises:
    ValueError, OSError: with a message for the user.
  """
  with Preemption() as preemption:
    run = prepare(settings, pathlib.Path(out), preemption)
    params = None  # those of the base
    for stage in stages_left(run):
      params, finished = train_stage(run, stage, params)
      if not finished:
        return EXIT_STATUS
      export(run, stage, params)
    report_rejected(run)
  return 0


def prepare(settings: TrainSettings, out: pathlib.Path, preemption) -> Run:
  """Checks everything, then makes the folder and opens what all stages need."""
  mesh = sharding.make_mesh(settings.mesh.shape(jax.device_count()))
  row_block(settings.data.rows, mesh)
  before = folder.check_folder(out, settings)
  check_base(settings)
  is_first = jax.process_index() == 0
  with Progress() as progress:
    sources = sources_lib.open_sources(
        settings.data.path, modes_of(settings), max_rejected=settings.data.max_rejected,
        progress=progress)
    records = {mode: len(source) for mode, source in sources.items()}
    folder.check_records(before, records, settings.data.path)
    base = pathlib.Path(settings.checkpoint or out / BASE)
    meet("checked")  # before one of them changes what the others look at
    if is_first:
      folder.start(out, settings, (before or {}) | records)
      if not base.exists():
        init.write_random_checkpoint(base, settings.model, settings.seed)
    meet("started")
    progress("read")
    tokenizer = load_tokenizer(base, settings.model.llm.vocab_size)
    _, params = weights.load_checkpoint(base, dtype=np.float32, part="vae")
  run = Run(settings=settings, out=out, mesh=mesh, base=base, tokenizer=tokenizer,
            sources=sources, vae=params["vae"], preemption=preemption,
            encoder=Encoder(settings.model, params["vae"]),
            log_folder=out if is_first else None)
  report_rejected(run)
  return run


def report_rejected(run: Run) -> None:
  """Prints how many records cannot be used, by mode and reason."""
  for mode, reasons in rejected(run.sources).items() if run.log_folder else ():
    print(f"{mode}: {sum(reasons.values())} of {run.sources[mode].metadata['rows']} rows cannot "
          f"be used: {counts(reasons)}", file=sys.stderr)


def modes_of(settings: TrainSettings) -> list[str]:
  """Modes that a stage to run draws from."""
  return [m for m in MODES if any(m in stage.mixture for stage in settings.stages.values())]


def check_base(settings: TrainSettings) -> None:
  """Refuses to start from nothing, or from weights of another model.

  Raises:
    ValueError: names the field.
  """
  if not settings.checkpoint:
    if settings.preset not in RANDOM_PRESETS:
      raise ValueError(f"the preset {settings.preset!r} starts from trained weights: give "
                       "--checkpoint DIR")
    return
  theirs = config_lib.to_dict(weights.read_config(settings.checkpoint))
  ours = config_lib.to_dict(settings.model)
  for part in ("llm", "vit", "vae", "max_latent_size", "latent_patch_size"):
    if ours[part] != theirs[part]:
      raise ValueError(f"config field 'model.{part}' is {ours[part]}, but the weights in "
                       f"{settings.checkpoint} have {theirs[part]}")


def stages_left(run: Run) -> list[str]:
  """The stages from the one on that was last at work."""
  stages = list(run.settings.stages)
  begun = [i for i, stage in enumerate(stages) if steps_in(run.out / stage / "checkpoints")]
  return stages[begun[-1]:] if begun else stages


def export(run: Run, stage: str, ema) -> None:
  """Writes the weights of a finished stage, unless they are there: STAGE/weights."""
  target = run.out / stage / "weights"
  if not target.exists():
    with Progress() as progress:
      progress(f"writing the weights of {stage}", step=1)
      published.save(target, {"transformer": ema, "vae": run.vae}, run.settings.model,
                     source=run.base)
  meet(f"{stage} written")
  if run.log_folder:
    print(f"wrote {target}; to draw with it: irg generate PROMPT --checkpoint {target}",
          file=sys.stderr)
