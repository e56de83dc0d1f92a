"""One stage of training: its first state, the loop, checkpoints, what is reported."""

import collections
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import chips, sharding, weights
from irg_jax.data.pipeline import open_batches
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train import flops, logs
from irg_jax.train.checkpoints import Checkpoints
from irg_jax.train.feed import Feed, row_block
from irg_jax.train.optimizer import make_optimizer
from irg_jax.train.processes import gather
from irg_jax.train.settings import STAGES, TrainSettings
from irg_jax.train.state import init_state, state_shardings
from irg_jax.train.step import make_train_step
from irg_jax.train.watch import Late, NonFiniteLoss, Tracer
from irg_jax.weights import names
from irg_jax.weights.names import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What all stages share.

  Attributes:
    settings: of the run.
    out: its folder.
    log_folder: the same in the first process, None in the others.
    mesh: all devices of all processes.
    base: checkpoint folder that training starts from.
    tokenizer, sources, encoder: see `pipeline.open_batches`.
    vae: its frozen parameters.
    preemption: tells when to stop.
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
  preemption: Any


def train_stage(run: Run, stage: str, params):
  """Trains one stage to its end, from where its newest checkpoint is.

  Args:
    params: what it starts from if it has none, used up; None: the base weights.

  Returns:
    (its moving average, whether the end was reached).

  Raises:
    NonFiniteLoss: names the step, the samples and the last good checkpoint.
    CheckpointError, OSError, ValueError: something cannot be written or read; names the last
      good one, if there is any.
  """
  report = functools.partial(print, file=sys.stderr) if run.log_folder else lambda _: None
  with Checkpoints(run.out / stage / "checkpoints", run.settings.keep, report) as checkpoints:
    try:
      return go_on(run, stage, params, checkpoints)
    except (CheckpointError, NonFiniteLoss):
      raise  # they name it themselves
    except (OSError, ValueError) as e:
      if not checkpoints.steps():
        raise
      raise ValueError(f"{e}; {checkpoints.last_good()}") from e


def go_on(run: Run, stage: str, params, checkpoints: Checkpoints):
  """`train_stage` with its checkpoints open."""
  s, settings = run.settings.stages[stage], run.settings
  optimizer = make_optimizer(settings.optimizer, s)
  start, state, data = first_state(run, checkpoints, optimizer, params)
  batches = open_data(run, stage, data)
  with open_log(run, stage, start) as log:
    origin = "the base weights" if params is None else "the moving average of the stage before"
    origin = f"step {start} of {checkpoints.folder}" if start else origin
    log.note(f"{stage}: from {origin}, to step {s.steps}")
    log.event(stage, start, rejected=rejected(run.sources))
    with Feed(batches, settings.data.rows, settings.data.accumulate, run.mesh) as feed:
      state, step, finished = loop(run, stage, optimizer, state, start, feed, checkpoints, log)
      checkpoints.wait()
    log_skipped(log, stage, step, gather({str(jax.process_index()): batches.skipped}))
    if not finished:
      log.note(f"{stage}: stopped by SIGTERM; step {step} is saved, the same command goes on")
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
  # Donated: what training starts from is not held beside the state.
  return 0, jax.jit(make, out_shardings=placed, donate_argnums=0)(params), None


def open_data(run: Run, stage: str, state: dict | None):
  """This process's batches of a stage, from a data state on."""
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
  """The log of a stage from a step on; what it holds of later steps is forgotten."""
  s, settings = run.settings.stages[stage], run.settings
  if run.log_folder:
    logs.forget_after(run.out, stage, start, STAGES)
  rows = settings.data.rows * settings.data.accumulate
  used = lambda values: {name: values[f"packing/{name}"] for name in flops.USES}
  peak = settings.peak_tflops or chips.peak_tflops(jax.devices()[0].device_kind)
  return logs.Log(
      run.log_folder, stage, start=start, total=s.steps, every=settings.log_every,
      step_flops=lambda values: rows * flops.row_flops(settings.model, s.sizes, used(values)),
      peak_flops=peak * 1e12 * jax.device_count())


def loop(run: Run, stage: str, optimizer, state, start: int, feed: Feed, checkpoints: Checkpoints,
         log: logs.Log):
  """The steps from `start` to the end of the stage, or to SIGTERM.

  Returns:
    (state, steps made, whether that is the end of the stage).
  """
  s, settings = run.settings.stages[stage], run.settings
  key = jax.jit(lambda: jax.random.fold_in(jax.random.key(settings.seed), STAGES.index(stage)),
                out_shardings=NamedSharding(run.mesh, PartitionSpec()))()
  late = Late(log, checkpoints, run.mesh)
  tracer = Tracer(run.out / stage / "profile", settings.profile_at, settings.profile_steps)
  train_step = None
  for step in range(start + 1, s.steps + 1):
    batch, data = next(feed)
    if train_step is None:
      train_step = make_train_step(UnifiedTransformer(settings.model), optimizer, settings,
                                   run.mesh, state, batch)
    tracer.before(step)
    state, metrics = train_step(s.switches(step - 1), state, batch, key)
    late.push(step, metrics, batch)
    checkpoints.check()
    stopping = run.preemption.reached()
    tracer.after(step, stopping or step == s.steps, late.flush)
    if step % settings.checkpoint_every == 0 or step == s.steps or stopping:
      late.flush()  # a state that went wrong must not be saved
      checkpoints.save(step, state, data)
    if stopping:
      return state, step, step == s.steps
  return state, s.steps, True


def rejected(sources: dict) -> dict[str, dict[str, int]]:
  """Records that cannot be used, by mode and reason."""
  return {mode: source.metadata["rejected"] for mode, source in sources.items()
          if source.metadata.get("rejected")}


def log_skipped(log: logs.Log, stage: str, step: int, by_process: dict) -> None:
  """Says how many samples fitted no row so far, by mode and by what they exceed."""
  total = collections.defaultdict(collections.Counter)
  for skipped in by_process.values():
    for mode, limits in skipped.items():
      total[mode].update(limits)
  for mode, limits in total.items():
    log.note(f"{stage}: {sum(limits.values())} samples of {mode} were larger than a row: "
             f"{counts(limits)}")
  log.event(stage, step, skipped=total)


def counts(by_reason: dict) -> str:
  return ", ".join(f"{reason} {count}" for reason, count in sorted(by_reason.items()))
