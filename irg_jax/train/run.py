"""One `irg train` from settings to exported weights, top to bottom.

The folder of a run:
  run.json                  settings, records by mode, the checkpoint that training started from
  log.jsonl, tensorboard/   metrics of every step
  base/                     random weights, where training started without a checkpoint
  .sample/                  the sample set, where data.path is "sample"
  STAGE/checkpoints/STEP    training state and position in the data
  STAGE/weights             the moving average, in the published layout
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import config as config_lib
from irg_jax import chips, runs, sharding, storage, weights
from irg_jax.data import sample_set
from irg_jax.data import sources as sources_lib
from irg_jax.data.latents import Encoder
from irg_jax.data.pipeline import open_batches
from irg_jax.data.records import MODES
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.model.vae import encode_levels
from irg_jax.progress import Progress
from irg_jax.tokenizer import load_tokenizer
from irg_jax.train import logs
from irg_jax.train.checkpoints import Checkpoints, steps_in
from irg_jax.train.distributed import PREEMPTED, Preemption, barrier, gather
from irg_jax.train.feed import Feed, row_block
from irg_jax.train.settings import GONE, STAGES, TrainSettings
from irg_jax.train.state import init_state, make_optimizer, state_shardings
from irg_jax.train.step import USES, make_train_step, row_flops
from irg_jax.weights import init, names, published
from irg_jax.weights.names import CheckpointError
from irg_jax.weights.orbax import BASE, RUN_FILE

PROFILED_STEPS = 3  # of each stage, in a profiler trace

# Settings that may change when a run is continued: the numbers do not depend on them, or they
# say how far to train.
FREE = ("checkpoint", "random_weights", "run_stages", "mesh", "checkpoint_every", "keep",
        "log_every", "profile_at", "data.path", "data.workers", "data.max_rejected", "model.remat",
        *(f"{stage}.steps" for stage in STAGES), *GONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What all stages of a run share.

  Attributes:
    settings: of the run.
    out: folder of the run.
    log_folder: the same in the first process, None in the others.
    mesh: all devices of all processes.
    base: checkpoint folder that training starts from.
    tokenizer, sources, encoder: see `pipeline.open_batches`.
    vae: its frozen parameters.
    preemption: says when to stop.
  """

  settings: TrainSettings
  out: pathlib.Path
  log_folder: pathlib.Path | None
  mesh: jax.sharding.Mesh
  base: pathlib.Path
  tokenizer: Any
  sources: dict
  encoder: Any
  vae: dict
  preemption: Preemption


def run_train(settings: TrainSettings, out) -> int:
  """Trains the stages that the settings name, from where they were left off.

  Args:
    out: folder of the run, new or of a run to continue.

  Returns:
    exit status: 0, or `distributed.PREEMPTED` after SIGTERM.

  Raises:
    ValueError, OSError: with a message for the user.
  """
  with Preemption() as preemption:
    run = prepare(settings, pathlib.Path(out), preemption)
    ema = None  # the first stage starts from the base weights
    for stage in unfinished_stages(run):
      ema, finished = train_stage(run, stage, ema)
      if not finished:
        return PREEMPTED
      export(run, stage, ema)
    print_rejected(run)
  return 0


# --- before the first step


def prepare(settings: TrainSettings, out: pathlib.Path, preemption: Preemption) -> Run:
  """Checks everything, then makes the folder and opens what all stages need."""
  mesh = sharding.make_mesh(settings.mesh.shape(jax.device_count()))
  row_block(settings.data.rows, mesh)
  recorded = check_folder(out, settings)
  check_base(settings)
  is_first = jax.process_index() == 0
  modes = [m for m in MODES if any(m in stage.mixture for stage in settings.stages.values())]
  with Progress() as progress:
    path = data_folder(settings, out)
    sources = sources_lib.open_sources(
        path, modes, max_rejected=settings.data.max_rejected, progress=progress)
    records = {mode: len(source) for mode, source in sources.items()}
    runs.check_same({"records": {mode: recorded.get(mode, n) for mode, n in records.items()}},
                    {"records": records}, f"--data {path}")
    base = pathlib.Path(settings.checkpoint or out / BASE)
    barrier("checked")  # no process may change the folder while another still checks it
    if is_first:
      start_folder(out, settings, recorded | records)
      if not base.exists():
        init.write_random_checkpoint(base, settings.model, settings.seed)
    barrier("started")
    progress("read")
    tokenizer = load_tokenizer(base, settings.model.llm.vocab_size)
    _, params = weights.load_checkpoint(base, dtype=np.float32, part="vae")
  run = Run(settings=settings, out=out, mesh=mesh, base=base, tokenizer=tokenizer,
            sources=sources, vae=params["vae"], preemption=preemption,
            encoder=Encoder(settings.model, params["vae"], encode_levels),
            log_folder=out if is_first else None)
  print_rejected(run)
  return run


def print_rejected(run: Run) -> None:
  """Prints the number of unusable records, by mode and reason."""
  for mode, reasons in logs.rejected(run.sources).items() if run.log_folder else ():
    print(f"{mode}: {sum(reasons.values())} of {run.sources[mode].metadata['rows']} rows cannot "
          f"be used: {logs.counts(reasons)}", file=sys.stderr)


def check_folder(out: pathlib.Path, settings: TrainSettings) -> dict:
  """Checks that a run can be started or continued in a folder.

  Returns:
    Number of records by mode that the run was started with; {} for a new run.

  Raises:
    ValueError: the folder holds something else, or a run with other settings.
  """
  storage.check_output_folder(out)
  runs.check_folder(out / RUN_FILE, "a training run")
  if not (out / RUN_FILE).is_file():
    return {}
  record = runs.read(out / RUN_FILE, ("settings", "records"))
  runs.check_same(record["settings"], dataclasses.asdict(settings), f"--out {out}",
                  flag="--config.", free=FREE, renamed=config_lib.renamed(TrainSettings))
  if settings.run_stages == "stage2" and (out / "stage1").is_dir():
    raise ValueError(f"--out {out}: has a stage 1, so run_stages must be both; to train stage 2 "
                     f"alone, choose another --out and --checkpoint {out / 'stage1' / 'weights'}")
  return record["records"]


def data_folder(settings: TrainSettings, out: pathlib.Path) -> pathlib.Path:
  """The folder of the data. For data.path "sample", OUT/.sample, which is made if missing."""
  if settings.data.path != sample_set.NAME:
    return pathlib.Path(settings.data.path)
  folder = out / f".{sample_set.NAME}"
  if jax.process_index() == 0 and not folder.exists():
    sample_set.write(folder)
  barrier("data written")
  return folder


def check_base(settings: TrainSettings) -> None:
  """Refuses weights of another model, and random weights unless the settings ask for them."""
  if not settings.checkpoint:
    if not settings.random_weights:
      raise ValueError("training starts from trained weights: give --checkpoint DIR, or "
                       "--config.random_weights=true")
    return
  theirs = dataclasses.asdict(weights.read_config(settings.checkpoint))
  ours = dataclasses.asdict(settings.model)
  for part in ("llm", "vit", "vae", "max_latent_size", "latent_patch_size"):
    if ours[part] != theirs[part]:
      raise ValueError(f"config field 'model.{part}' is {ours[part]}, but the weights in "
                       f"{settings.checkpoint} have {theirs[part]}")


def start_folder(out: pathlib.Path, settings: TrainSettings, records: dict) -> None:
  """Writes the record of the run, and removes the partial folders of a killed process."""
  for folder in (out, *(out / stage for stage in STAGES)):
    storage.remove_partials(folder)
  base = settings.checkpoint and str(pathlib.Path(settings.checkpoint).absolute())
  runs.write(out / RUN_FILE, {"settings": dataclasses.asdict(settings), "records": records,
                              "base": base})


def unfinished_stages(run: Run) -> list[str]:
  """The stages to run, without those before the last one that has a checkpoint."""
  stages = list(run.settings.stages)
  begun = [i for i, stage in enumerate(stages) if steps_in(run.out / stage / "checkpoints")]
  return stages[begun[-1]:] if begun else stages


# --- one stage


def train_stage(run: Run, stage: str, params):
  """Trains one stage to its end, from its newest checkpoint on.

  Args:
    params: what the stage starts from if it has no checkpoint, donated; None: the base weights.

  Returns:
    (moving average of the parameters, whether the end was reached).

  Raises:
    NonFiniteLoss: names the step, the samples and the last good checkpoint.
    CheckpointError, OSError, ValueError: something cannot be written or read; names the last
      good checkpoint, if there is any.
  """
  report = functools.partial(print, file=sys.stderr) if run.log_folder else lambda _: None
  with Checkpoints(run.out / stage / "checkpoints", run.settings.keep, report) as checkpoints:
    try:
      return continue_stage(run, stage, params, checkpoints)
    except (CheckpointError, logs.NonFiniteLoss):
      raise  # these name the checkpoint themselves
    except (OSError, ValueError) as e:
      if not checkpoints.steps():
        raise
      raise ValueError(f"{e}; {checkpoints.last_good()}") from e


def continue_stage(run: Run, stage: str, params, checkpoints: Checkpoints):
  """`train_stage` with its checkpoints open."""
  s, settings = run.settings.stages[stage], run.settings
  optimizer = make_optimizer(settings.optimizer, s)
  start, state, data = first_state(run, checkpoints, optimizer, params)
  batches = open_data(run, stage, data)
  with open_log(run, stage, start) as log:
    origin = "the base weights" if params is None else "the moving average of the stage before"
    origin = f"step {start} of {checkpoints.folder}" if start else origin
    log.note(f"{stage}: from {origin}, to step {s.steps}")
    log.event(start, rejected=logs.rejected(run.sources))
    with Feed(batches, settings.data.rows, settings.data.accumulate, run.mesh) as feed:
      state, step, finished = loop(run, stage, optimizer, state, start, feed, checkpoints, log)
      checkpoints.wait()
    log.skipped(step, gather({str(jax.process_index()): batches.skipped}))
    if not finished:
      log.note(f"{stage}: stopped by SIGTERM; step {step} is saved, the same command continues")
  return state.ema, finished


def first_state(run: Run, checkpoints: Checkpoints, optimizer, params):
  """(step, state, data state or None): from the newest checkpoint, or before the first step."""
  make = functools.partial(init_state, optimizer=optimizer)
  shapes = names.abstract_params(run.settings.model, np.float32)["transformer"]
  shapes = jax.eval_shape(make, shapes)
  placed = state_shardings(shapes, run.mesh)
  restored = checkpoints.restore(jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed))
  if restored is not None:
    return restored
  if params is None:
    _, loaded = weights.load_checkpoint(
        run.base, dtype=np.float32, part="transformer",
        shardings_fn=lambda tree: sharding.parameter_shardings(tree, run.mesh))
    params = loaded["transformer"]
  # Donated: the state replaces the parameters that training starts from.
  return 0, jax.jit(make, out_shardings=placed, donate_argnums=0)(params), None


def open_data(run: Run, stage: str, state: dict | None):
  """This process's batches of a stage, continued from a data state."""
  s, settings = run.settings.stages[stage], run.settings
  block, count = row_block(settings.data.rows, run.mesh)
  batches = open_batches(
      settings.data, run.sources, run.tokenizer, settings.model, mixture=s.mixture, sizes=s.sizes,
      seed=settings.seed * len(STAGES) + STAGES.index(stage), process_index=block,
      process_count=count, encode=run.encoder)
  if state is not None:
    batches.set_state(state)
  return batches


def open_log(run: Run, stage: str, start: int) -> logs.Log:
  """The log of a stage, continued after step `start`; its lines of later steps are removed."""
  s, settings = run.settings.stages[stage], run.settings
  if run.log_folder:
    logs.forget_after(run.out, stage, start, STAGES)
  rows = settings.data.rows * settings.data.accumulate
  used = lambda values: {name: values[f"packing/{name}"] for name in USES}
  peak = chips.peak_tflops(jax.devices()[0].device_kind)
  return logs.Log(
      run.log_folder, stage, start=start, total=s.steps, every=settings.log_every,
      step_flops=lambda values: rows * row_flops(settings.model, s.sizes, used(values)),
      peak_flops=peak * 1e12 * jax.device_count())


def loop(run: Run, stage: str, optimizer, state, start: int, feed: Feed, checkpoints: Checkpoints,
         log: logs.Log):
  """The steps after `start`, to the end of the stage or to SIGTERM.

  Returns:
    (state, steps made, whether that is the end of the stage).
  """
  s, settings = run.settings.stages[stage], run.settings
  key = jax.jit(lambda: jax.random.fold_in(jax.random.key(settings.seed), STAGES.index(stage)),
                out_shardings=NamedSharding(run.mesh, PartitionSpec()))()
  metrics_log = logs.LateMetrics(log, checkpoints.last_good, run.mesh)
  tracer = logs.Tracer(run.out / stage / "profile", settings.profile_at, PROFILED_STEPS)
  train_step = None
  for step in range(start + 1, s.steps + 1):
    batch, data = next(feed)
    if train_step is None:
      train_step = make_train_step(UnifiedTransformer(settings.model), optimizer, settings,
                                   run.mesh, state, batch)
    tracer.before(step)
    state, metrics = train_step(s.switches(step - 1), state, batch, key)
    metrics_log.push(step, metrics, batch)
    checkpoints.check()
    stopping = run.preemption.reached()
    tracer.after(step, stopping or step == s.steps, metrics_log.flush)
    if step % settings.checkpoint_every == 0 or step == s.steps or stopping:
      metrics_log.flush()  # raises before a state that has diverged is saved
      checkpoints.save(step, state, data)
    if stopping:
      return state, step, step == s.steps
  return state, s.steps, True


def export(run: Run, stage: str, ema) -> None:
  """Writes the weights of a finished stage to STAGE/weights, unless they are there."""
  target = run.out / stage / "weights"
  if not target.exists():
    with Progress() as progress:
      progress(f"writing the weights of {stage}", step=1)
      published.save(target, {"transformer": ema, "vae": run.vae}, run.settings.model,
                     source=run.base)
  barrier(f"{stage} written")
  if run.log_folder:
    print(f"wrote {target}; to generate with it: irg generate PROMPT --checkpoint {target}",
          file=sys.stderr)
