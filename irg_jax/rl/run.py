"""One `irg rl` from settings to exported weights, top to bottom.

The folder of a run:
  run.json                  settings, the checkpoint that it started from, and fingerprints
  log.jsonl, tensorboard/   metrics of every iteration
  rollouts/ITERATION/       trajectories and their rewards, see `rollout`
  judge_cache.sqlite        the answers of a judge, if there is one
  rl/checkpoints/ITERATION  state after the updates of an iteration
  rl/weights                what was trained, in the published layout
  rl/adapters               the adapters alone in PEFT's files, where lora.rank is set

Everything random follows from the seed, the iteration and the number of the trajectory, so a run
that goes on after a kill makes the same.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import config as config_lib
from irg_jax import runs, sharding, storage, weights
from irg_jax.generate import generator
from irg_jax.generate.settings import Defaults, Settings, read_defaults
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.progress import Progress
from irg_jax.rl import batches, objective, prompts, rewards, rollout, statistics, step
from irg_jax.rl.settings import STAGE, RlSettings
from irg_jax.tokenizer import Tokenizer, load_tokenizer
from irg_jax.train import checks, logs, tracking, watch
from irg_jax.train import run as train_run
from irg_jax.train.checkpoints import Checkpoints
from irg_jax.train.distributed import PREEMPTED, note, preemption
from irg_jax.train.step import make_optimizer
from irg_jax.weights import lora
from irg_jax.weights.orbax import RUN_FILE

# Settings that may change when a run is continued.
FREE = ("checkpoint", "iterations", "mesh", "checkpoint_every", "keep", "samples_every", "wandb",
        "rollout.keep", "judge.url", "judge.concurrency", "model.attention", "model.remat")
_REWARDS = "rewards.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Constants of a run; `train.run`'s functions read it as one of theirs."""

  settings: RlSettings  # with the sizes of the checkpoint
  out: pathlib.Path  # folder of the run
  mesh: jax.sharding.Mesh
  base: pathlib.Path  # checkpoint folder that the run starts from
  fingerprint: str  # of the checkpoint
  tokenizer: Tokenizer
  vae: dict  # its frozen parameters
  defaults: Defaults  # of the checkpoint
  generation: Settings  # of trajectories
  prompts: prompts.Prompts
  rewards: dict[str, Callable]  # by name
  stopping: Callable[[], bool]  # see `distributed.preemption`


def run_rl(settings: RlSettings, out) -> int:
  """Learns from where the run in folder `out` was left off.

  Returns the exit status: 0, or `distributed.PREEMPTED` after SIGTERM. ValueError and OSError have
  a message for the user.
  """
  out = storage.path(out)
  with contextlib.ExitStack() as stack:
    stopping = stack.enter_context(preemption())
    stack.enter_context(runs.locked(
        out / ".lock", f"--out {out}: another irg rl is at work in it"))
    found = prepare(settings, out)
    functions = stack.enter_context(rewards.opened(settings, out))
    run = Run(**found, out=out, rewards=functions, stopping=stopping)
    ema, finished = learn(run)
    if finished:
      train_run.export(run, STAGE, ema)
  return 0 if finished else PREEMPTED


# --- before the first iteration


def prepare(settings: RlSettings, out: pathlib.Path) -> dict:
  """Checks everything, and writes run.json; fields of `Run` by name."""
  if jax.process_count() > 1:
    raise ValueError("irg rl runs in one process, on all devices of one host")
  rewards.names(settings)
  base = storage.path(settings.checkpoint or storage.SHIPPED)
  settings, defaults = with_model(settings, base), read_defaults(base)
  generation = settings.rollout.settings(defaults.settings)
  generation.validate(settings.model)
  settings.check_generation(generation)
  defaults.check(generation)
  mesh = sharding.make_mesh(settings.mesh.shape(jax.device_count()))
  tracking.check(settings.wandb)
  source = prompts.Prompts(settings)
  recorded = check_folder(out, settings)
  fingerprint = checks.check_base(dataclasses.replace(settings, checkpoint=str(base)), recorded)
  followed = {"prompts": source.digest} | (
      {"satisfied": defaults.satisfied} if generation.until_satisfied else {})
  runs.check_same({name: recorded.get(name, x) for name, x in followed.items()}, followed,
                  f"--out {out}, prompts {settings.prompts}")
  tokenizer = load_tokenizer(base, settings.model.llm.vocab_size)
  generator.check_lengths(
      settings.model, tokenizer, generation, defaults.system_prompt,
      [defaults.read(record["prompt"], generation).text for record in source.known])
  with Progress() as progress:
    progress("read")
    vae = weights.load_checkpoint(base, dtype=np.float32, part="vae")[1]["vae"]
  storage.remove_partials(out)
  runs.write(out / RUN_FILE, {
      "settings": dataclasses.asdict(settings), "base": str(base.absolute()),
      "fingerprint": fingerprint, **followed})
  return dict(settings=settings, mesh=mesh, base=base, fingerprint=fingerprint, vae=vae,
              tokenizer=tokenizer, defaults=defaults, generation=generation, prompts=source)


def with_model(settings: RlSettings, base) -> RlSettings:
  """The settings with the sizes of a checkpoint's model, checked again."""
  if not base.is_dir():
    raise ValueError(f"config field 'checkpoint' is {str(base)!r}: no such folder")
  own = {name: getattr(settings.model, name)
         for name in ("dtype", "param_dtype", "attention", "remat")}
  model = dataclasses.replace(weights.read_config(base), **own)
  return config_lib.check(dataclasses.replace(settings, model=model))


def check_folder(out: pathlib.Path, settings: RlSettings) -> dict:
  """The record of the run in a folder, {} for a new one; ValueError as of `checks.check_folder`."""
  storage.check_output_folder(out)
  runs.check_folder(out / RUN_FILE, "a run of irg rl")
  if not (out / RUN_FILE).is_file():
    return {}
  record = runs.read(out / RUN_FILE, ("settings",))
  then = record["settings"]
  if isinstance(then.get("rollout"), dict):  # older runs had no choice
    then = then | {"rollout": {"until_satisfied": None} | then["rollout"]}
  runs.check_same(then, dataclasses.asdict(settings), f"--out {out}",
                  flag="--config.", free=FREE, renamed=config_lib.renamed(RlSettings))
  return record


# --- the iterations


def learn(run: Run):
  """(moving average of what is trained, whether the end was reached)."""
  s = run.settings
  optimizer = make_optimizer(s.optimizer, s.stage)
  with Checkpoints(run.out / STAGE / "checkpoints", s.keep, note) as checkpoints:
    iteration, state, _ = train_run.first_state(run, checkpoints, optimizer, None)
    with open_log(run, iteration) as log:
      log.note(f"{STAGE}: from {f'iteration {iteration}' if iteration else run.base}, to iteration "
               f"{s.iterations}; {s.batch} prompts of {s.group} trajectories each")
      if iteration < s.iterations:  # what was exported before there were more iterations
        for name in ("weights", "adapters"):
          storage.remove_folder(run.out / STAGE / name)
      learner = Learner(run, optimizer, log.busy)
      for iteration in range(iteration + 1, s.iterations + 1):
        state = iterate(run, learner, state, iteration, log)
        checkpoints.check()
        stopping = run.stopping()
        if stopping or iteration == s.iterations or iteration % s.checkpoint_every == 0:
          log.copy()  # before the checkpoint, which is of no use without its lines
          checkpoints.save(iteration, state, {"0": {"iteration": iteration}})
        rollout.forget(run.out / "rollouts", iteration, s.rollout.keep)
        if stopping:
          break
      checkpoints.wait()
      if iteration < s.iterations:
        log.note(f"{STAGE}: stopped by SIGTERM; iteration {iteration} is saved, the same command "
                 "continues")
  return state.ema, iteration >= s.iterations


def iterate(run: Run, learner: "Learner", state, iteration: int, log: logs.Log):
  """One iteration: trajectories, rewards, advantages, updates; returns the new state."""
  s, folder, seconds = run.settings, rollout.iteration_folder(run.out, iteration), {}
  with _timed(seconds, "trajectories"):
    rollouts = learner.sample(state.params, run.prompts(iteration - 1), iteration, folder)
  with _timed(seconds, "rewards"):
    found = rewards_of(run, rollouts, folder)
  worth = [advantages(rewards.mixed(found, track.reward or s.reward), s)
           for track in (s.text, s.image)]
  with _timed(seconds, "updates"):
    rows = batches.make_rows(rollouts, *worth, s, run.generation, run.defaults, run.tokenizer,
                             s.model)
    state, metrics = learner.update(state, rows)
  values = statistics.of_rollouts(rollouts, found, s, run.generation.until_satisfied) | metrics | {
      f"seconds/{name}": x for name, x in seconds.items()}
  log.step(iteration, values, [])
  if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
    raise ValueError(f"iteration {iteration}: loss {metrics['loss']}, norm of the gradient "
                     f"{metrics['grad_norm']}; lower learning_rate")
  if s.samples_every and iteration % s.samples_every == 0:
    values, told = statistics.samples(rollouts, rewards.mixed(found, s.reward))
    log.evaluation(iteration, values, told, sample=rollouts[0].record["prompt"])
  return state


def advantages(reward, settings: RlSettings) -> np.ndarray:
  """float32 [N, rounds] of rewards [N, rounds]: apart for each group and round."""
  worth = objective.discounted(reward, settings.discount)
  groups_PRG = worth.reshape(-1, settings.group, worth.shape[1]).swapaxes(1, 2)
  found_PRG = objective.advantages(groups_PRG, settings.advantage_limit)
  return found_PRG.swapaxes(1, 2).reshape(worth.shape)


def rewards_of(run: Run, rollouts, folder) -> dict[str, np.ndarray]:
  """{name: rewards [N, rounds]}, see `rewards.of_trajectories`; kept beside the trajectories."""
  path = folder / _REWARDS
  if not path.is_file():
    found = rewards.of_trajectories(
        run.rewards, [r.record for r in rollouts], [r.trajectory for r in rollouts])
    plain = {name: [[None if math.isnan(x) else x for x in row] for row in values.tolist()]
             for name, values in found.items()}
    storage.write_json(path, plain)
  return {name: np.array(values, np.float64) for name, values in storage.read_json(path).items()}


class Learner:
  """The policy at work: samples trajectories and makes updates; compiles what it needs, once.

  `say` is told what it does, for the terminal.
  """

  def __init__(self, run: Run, optimizer, say):
    s = run.settings
    self._run, self._optimizer, self._say = run, optimizer, say
    self._model = UnifiedTransformer(s.model)
    self._base = [train_run.load_frozen(run)] * bool(s.lora.rank)
    # Of adapters, the reference is what they are beside.
    self._reference = (self._base or [train_run.load_frozen(run)]) if s.measured else []
    self._vae = jax.device_put(run.vae, NamedSharding(run.mesh, PartitionSpec()))
    self._cast = jax.jit(functools.partial(watch.cast, s, run.mesh))
    self._measure, self._updates = step.make_measure(self._model, s, run.mesh), {}

  def sample(self, params, records, iteration: int, folder) -> list[rollout.Rollout]:
    """The trajectories of an iteration; the mesh is set while they are sampled."""
    run, s = self._run, self._run.settings
    model = UnifiedTransformer(dataclasses.replace(s.model, remat="none"))
    with lora.applied(1.0):
      params = lora.beside(self._base[0] if self._base else {}, self._cast(params))
      loaded = generator.Generator(
          run.base, f"{run.fingerprint}, iteration {iteration}", run.defaults, run.tokenizer,
          run.mesh, model, {"transformer": params, "vae": self._vae})
      return rollout.sample(loaded, s, run.generation, records, iteration, folder,
                            identity(run, iteration), self._say)

  def update(self, state, rows) -> tuple:
    """(state, metrics) after the updates on an iteration's rows; metrics are means over them."""
    s, metrics = self._run.settings, []
    self._say("updates")
    size = len(rows) // s.updates
    shares = [batches.stack(rows[i:i + size], s.accumulate) for i in range(0, len(rows), size)]
    empty = self._shapes(state, shares[0])
    known = [self._known(state, share, empty, number) for number, share in enumerate(shares)]
    program = self._program(state, shares[0], empty)
    for number, (share, (old, reference)) in enumerate(zip(shares, known)):
      state, found = program(state, share, old, reference, np.bool_(number == 0), *self._base)
      metrics.append(jax.device_get(found))
    return state, {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}

  def _known(self, state, share, empty, number):
    """(old, reference) of an update: measured where they are needed, else zeros."""
    old = self._measure(state.params, share, *self._base) if number else empty
    reference = self._measure(self._reference[0], share) if self._reference else empty
    return old, reference

  def _shapes(self, state, share):
    shapes = jax.eval_shape(self._measure, state.params, share, *self._base)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  def _program(self, state, share, empty):
    """The compiled update of rows of these sizes."""
    key = share.batch.text_ids.shape, share.batch.text_place.shape
    if key not in self._updates:
      self._updates[key] = step.make_update(self._model, self._optimizer, self._run.settings,
                                            self._run.mesh, state, share, empty, *self._base)
    return self._updates[key]


def identity(run: Run, iteration: int) -> str:
  """Digest of what an iteration's trajectories follow from."""
  fields = dataclasses.asdict(run.settings)
  fields = {name: x for name, x in fields.items() if name not in FREE and name != "judge"}
  fields["rollout"] = {name: x for name, x in fields["rollout"].items()
                       if name not in ("keep", "until_satisfied")}  # `generation` has the latter
  fields["model"] = {name: x for name, x in fields["model"].items()
                     if f"model.{name}" not in FREE}
  told = [iteration, run.fingerprint, run.prompts.digest, fields,
          dataclasses.asdict(run.generation), generator.versions()]
  told += [run.defaults.satisfied] * run.generation.until_satisfied
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def open_log(run: Run, start: int):
  """The log of the run, continued after iteration `start`."""
  s = run.settings
  with logs.written(run.out) as (folder, copy):
    logs.forget_after(folder, STAGE, start, (STAGE,))
    with logs.Log(folder, STAGE, run.mesh, start=start, total=s.iterations, every=1,
                  step_flops=lambda values: 0.0, peak_flops=0.0,
                  sink=tracking.sink(run, STAGE, folder), summary=statistics.line) as log:
      log.copy = copy
      yield log


@contextlib.contextmanager
def _timed(seconds, name):
  start = time.monotonic()
  yield
  seconds[name] = time.monotonic() - start
