"""One `irg train` from settings to exported weights, top to bottom.

The folder of a run:
  run.json                  settings, records by mode and their fingerprints, the checkpoint that
                            training started from and its fingerprint
  log.jsonl, tensorboard/   metrics of every step
  samples.html, samples/    what the moving average draws, see `watch`
  goodput.json              where the time went, see `goodput`
  base/                     random weights, where training started without a checkpoint
  .sample/                  the sample set, where data.path is "sample"
  .lock                     who trains in it now
  STAGE/profile             the profiler's trace, where profile_at is set
  STAGE/checkpoints/STEP    training state and position in the data
  STAGE/weights             the moving average, in the published layout
  STAGE/adapters            the adapters alone in PEFT's files, where lora.rank is set
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import chips, leases, messages, runs, sharding, storage, weights
from irg_jax.data import held_out, sample_set
from irg_jax.data import sources as sources_lib
from irg_jax.data.latents import Encoder
from irg_jax.data.pipeline import open_batches
from irg_jax.data.records import MODES
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.model.vae import encode_levels
from irg_jax.progress import Progress
from irg_jax.tokenizer import Tokenizer, load_tokenizer
from irg_jax.train import logs, tracking, watch
from irg_jax.train.checkpoints import Checkpoints, steps_in
from irg_jax.train.checks import check_base, check_data, check_folder
from irg_jax.train.distributed import PREEMPTED, gather, note, preemption, thread_barrier
from irg_jax.train.feed import feed, row_block
from irg_jax.train.goodput import Clock
from irg_jax.train.settings import STAGES, TrainSettings
from irg_jax.train.step import (
    MATRICES, init_state, make_optimizer, make_train_step, row_flops, trained_shapes)
from irg_jax.weights import init, lora, names, peft, published
from irg_jax.weights.orbax import BASE, RUN_FILE

PROFILED_STEPS = 3  # of each stage, in a profiler trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """State shared by all stages of a run."""

  settings: TrainSettings
  out: pathlib.Path  # folder of the run
  mesh: jax.sharding.Mesh  # all devices of all processes
  base: pathlib.Path  # checkpoint folder that training starts from
  tokenizer: Tokenizer
  sources: dict  # random access to the records to train on by mode
  held_out: dict  # likewise, to those of `data.held_out`
  encoder: Encoder
  vae: dict  # its frozen parameters
  drawing: watch.Drawing
  exam: watch.Exam | None
  clock: Clock
  stopping: Callable[[], bool]  # see `distributed.preemption`


def run_train(settings: TrainSettings, out, open_exam=None) -> int:
  """Trains the stages that the settings name, from where they were left off in folder `out`.

  Args:
    open_exam: opens the benchmark `watch.benchmark`, see `watch.read_exam`.

  Returns:
    exit status: 0, or `distributed.PREEMPTED` after SIGTERM.

  Raises:
    ValueError, OSError: with a message for the user.
  """
  out = storage.path(out)
  with preemption() as stopping, held(out), Clock(None if jax.process_index() else out) as clock:
    run = prepare(settings, out, stopping, clock, open_exam)
    ema, finished = None, True  # the first stage starts from the base weights
    for stage in unfinished_stages(run):
      ema, finished = train_stage(run, stage, ema)
      if not finished:
        break
      export(run, stage, ema)
    note(clock.summary())
    if finished:
      print_rejected(run.sources)
  return 0 if finished else PREEMPTED


@contextlib.contextmanager
def held(out: pathlib.Path):
  """Keeps other runs out of the folder meanwhile. The first process holds it, for all."""
  lock = runs.locked(out / ".lock", f"--out {out}: another irg train is at work in it")
  with lock if jax.process_index() == 0 else contextlib.nullcontext():
    thread_barrier("irg/held", 10 * runs.VOID)
    yield


# --- before the first step


def prepare(settings: TrainSettings, out: pathlib.Path, stopping, clock: Clock,
            open_exam=None) -> Run:
  """Checks everything, then makes the folder and opens what all stages need."""
  mesh = sharding.make_mesh(settings.mesh.shape(jax.device_count()))
  row_block(settings.data.rows, mesh)
  recorded = check_folder(out, settings)
  fingerprint = check_base(settings, recorded)
  base = storage.path(settings.checkpoint or out / BASE)
  drawing = watch.read_drawing(settings, base)
  exam = watch.read_exam(settings, drawing, open_exam)
  tracking.check(settings.wandb)
  modes = [m for m in MODES if any(m in stage.mixture for stage in settings.stages.values())]
  with Progress() as progress:
    path = data_folder(settings, out)
    sources = sources_lib.open_sources(
        path, modes, max_rejected=settings.data.max_rejected, progress=progress)
    found = check_data(path, sources, recorded)
    sync_global_devices("checked")  # no process may change the folder while another still checks it
    if jax.process_index() == 0:
      for folder in (out, *(out / stage for stage in STAGES)):
        storage.remove_partials(folder)  # of a killed process
      runs.write(out / RUN_FILE, {
          "settings": dataclasses.asdict(settings), **found,
          "base": settings.checkpoint and str(base.absolute()), "fingerprint": fingerprint})
      if not leases.is_finished(base):
        init.write_random_checkpoint(base, settings.model, settings.seed)
    sync_global_devices("started")
    progress("read")
    tokenizer = load_tokenizer(base, settings.model.llm.vocab_size)
    vae = weights.load_checkpoint(base, dtype=np.float32, part="vae")[1]["vae"]
  print_rejected(sources)
  note(watch.places(settings, out, PROFILED_STEPS))
  sources, apart = held_out.split(sources, settings.data.held_out)
  return Run(settings=settings, out=out, mesh=mesh, base=base, tokenizer=tokenizer,
             sources=sources, held_out=apart, vae=vae, drawing=drawing, exam=exam,
             clock=clock, stopping=stopping, encoder=Encoder(settings.model, vae, encode_levels))


def print_rejected(sources: dict) -> None:
  """Prints the number of unusable records, by mode and reason."""
  for mode, reasons in logs.rejected(sources).items():
    note(f"{mode}: {sum(reasons.values())} of {sources[mode].metadata['rows']} rows cannot "
         f"be used: {logs.counts(reasons)}")


def data_folder(settings: TrainSettings, out: pathlib.Path) -> pathlib.Path:
  """The folder of the data. For data.path "sample", OUT/.sample, which is made if missing.

  For a run in a bucket, each machine has the sample set in its folder for caches.
  """
  if settings.data.path != sample_set.NAME:
    return storage.path(settings.data.path)
  here = storage.is_local(out)
  folder = out / f".{sample_set.NAME}" if here else storage.cache_folder(sample_set.NAME)
  if not (here and jax.process_index()) and not folder.exists():
    try:
      sample_set.write(folder)
    except OSError:
      if not folder.exists():  # another process of this machine was first
        raise
  sync_global_devices("data written")
  return folder


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
    ValueError: the loss is not finite, or something cannot be written or read; names the last
      good checkpoint, if there is any.
  """
  settings, s = run.settings, run.settings.stages[stage]
  optimizer = make_optimizer(settings.optimizer, s)
  with Checkpoints(run.out / stage / "checkpoints", settings.keep, note) as checkpoints:
    with run.clock("restoring"):
      start, state, data = first_state(run, checkpoints, optimizer, params)
    block, blocks = row_block(settings.data.rows, run.mesh)
    batches = open_batches(
        settings.data, run.sources, run.tokenizer, settings.model, mixture=s.mixture,
        sizes=s.sizes, seed=settings.seed * len(STAGES) + STAGES.index(stage),
        process_index=block, process_count=blocks, encode=run.encoder)
    if data is not None:
      batches.set_state(data)
    with open_log(run, stage, start) as log:
      origin = "the base weights" if params is None else "the moving average of the stage before"
      origin = f"step {start} of {checkpoints.folder}" if start else origin
      log.note(f"{stage}: from {origin}, to step {s.steps}")
      log.event(start, rejected=logs.rejected(run.sources))
      with feed(batches, settings.data.rows, settings.data.accumulate, run.mesh) as ahead:
        state, step = loop(run, stage, optimizer, state, start, ahead, checkpoints, log)
        with run.clock("saving"):
          checkpoints.wait()
      log.event(step, goodput=run.clock.record())
      log.skipped(step, gather({str(jax.process_index()): batches.skipped}))
      if step < s.steps:
        log.note(f"{stage}: stopped by SIGTERM; step {step} is saved, the same command continues")
  return state.ema, step >= s.steps


def first_state(run: Run, checkpoints: Checkpoints, optimizer, params):
  """(step, state, data state or None): from the newest checkpoint, or before the first step."""
  make = lambda params: init_state(params, optimizer)
  shapes = jax.eval_shape(make, trained_shapes(run.settings))
  placed = sharding.parameter_shardings(shapes, run.mesh)
  restored = checkpoints.restore(
      jax.tree.map(lambda x, place: x.update(sharding=place), shapes, placed))
  if restored is not None:
    return restored
  if params is None and run.settings.lora.rank:
    params = new_adapters(run)
  elif params is None:
    params = load_base(run, np.float32)["transformer"]
  # Donated: the state replaces the parameters that training starts from.
  return 0, jax.jit(make, out_shardings=placed, donate_argnums=0)(params), None


def load_base(run: Run, dtype, part="transformer", merges=()) -> dict:
  """The parameters that training starts from, on the mesh; None: each one's own dtype."""
  return weights.load_checkpoint(
      run.base, dtype=dtype, part=part, merges=merges,
      shardings_fn=lambda tree: sharding.parameter_shardings(tree, run.mesh))[1]


def new_adapters(run: Run) -> dict:
  """Adapters that change nothing yet on the mesh, the same on all processes."""
  adapters = multihost_utils.broadcast_one_to_all(
      lora.new_adapters(run.settings.model, run.settings.lora, run.settings.seed))
  return jax.tree.map(lambda x, place: jax.make_array_from_callback(
      x.shape, place, x.__getitem__), adapters, sharding.parameter_shardings(adapters, run.mesh))


def load_frozen(run: Run) -> dict:
  """The parameters that stay as they are beside adapters, matrices in the compute dtype or int8."""
  leaves = names.flatten(load_base(run, None)["transformer"])
  for path in leaves:  # one by one: the longer forms are let go
    if path.endswith(MATRICES) and leaves[path].dtype != np.int8:
      leaves[path] = leaves[path].astype(run.settings.model.dtype)
  return names.unflatten(leaves)


@contextlib.contextmanager
def open_log(run: Run, stage: str, start: int):
  """The log of a stage, continued after step `start`; its lines of later steps are removed."""
  settings, s, first = run.settings, run.settings.stages[stage], jax.process_index() == 0
  rows = settings.data.rows * settings.data.accumulate
  used = lambda values: {name.removeprefix("packing/"): x for name, x in values.items()}
  with logs.written(run.out) as (folder, copy):
    if first:
      run.clock.resume(stage, start, logs.made(folder, stage)[0])
      logs.forget_after(folder, stage, start)
    with logs.Log(
        folder if first else None, stage, run.mesh, start=start, total=s.steps,
        every=settings.log_every, step_flops=lambda values: rows * row_flops(
            settings.model, s.sizes, used(values), settings.lora),
        peak_flops=sum(chips.peak_tflops(d.device_kind) for d in jax.devices()) * 1e12,
        sink=tracking.sink(run, stage, folder if first else None), more=run.clock.point) as log:
      log.folder, log.copy = folder, copy
      yield log


def loop(run: Run, stage: str, optimizer, state, start: int, batches, checkpoints: Checkpoints,
         log: logs.Log):
  """The steps after `start`, to the end of the stage or to SIGTERM.

  Returns:
    (state, steps made).
  """
  settings, s, step = run.settings, run.settings.stages[stage], start
  key = jax.jit(lambda: jax.random.fold_in(jax.random.key(settings.seed), STAGES.index(stage)),
                out_shardings=NamedSharding(run.mesh, PartitionSpec()))()
  train_step, evaluate = None, watch.open_watch(run, stage, log)
  base = [load_frozen(run)] * bool(settings.lora.rank)
  evaluate(start, state.ema, *base)
  for step in logs.traced(range(start + 1, s.steps + 1), log.folder / stage / "profile",
                          settings.profile_at, PROFILED_STEPS, log.flush):
    with run.clock("waiting for data"):
      batch, data = next(batches)
    if train_step is None:
      train_step = make_train_step(UnifiedTransformer(settings.model), optimizer, settings,
                                   run.mesh, state, batch, *base)
    with run.clock.update(stage, step):
      state, metrics = train_step(s.switches(step - 1), state, batch, key, *base)
      log.push(step, metrics, batch)
    checkpoints.check()
    stopping = run.stopping()
    if stopping or step == s.steps or step % settings.checkpoint_every == 0:
      log.flush()  # raises before a state that has diverged is saved
      with run.clock("saving"):
        log.copy()  # before the checkpoint, which is of no use without its lines
        checkpoints.save(step, state, data)
    if stopping:  # an evaluation that is due is made on the next start
      break
    evaluate(step, state.ema, *base)
  return state, step


def export(run: Run, stage: str, ema) -> None:
  """Writes the weights of a finished stage to STAGE/weights, unless they are there."""
  target = run.out / stage / "weights"
  if not leases.is_finished(target):
    try:
      with Progress() as progress:
        progress(f"writing the weights of {stage}", step=1)
        published.save(target, exported(run, stage, ema), run.settings.model, source=run.base)
    except OSError as e:
      raise ValueError(f"{messages.message(e)}; what was trained is in "
                       f"{run.out / stage / 'checkpoints'}, and the same command exports it") from e
  sync_global_devices(f"{stage} written")
  note(f"wrote {target}; to generate with it: irg generate PROMPT --checkpoint {target}")


def exported(run: Run, stage: str, ema) -> dict:
  """The parameters to export; adapters are written by themselves, too, and merged."""
  settings = run.settings
  if not settings.lora.rank:
    return {"transformer": ema, "vae": run.vae}
  if not leases.is_finished(adapters := run.out / stage / "adapters"):
    peft.save(adapters, ema, settings.model, settings.lora, str(run.base))
  return load_base(run, None, part="", merges=((ema, settings.lora.scale),))
