"""Trajectories by `generate`, in files: what was thought and drawn, and what the sampler did.

  ITERATION/FIRST/            trajectories FIRST, FIRST + 1, ..., sampled side by side
    batch.json                the digest of what they follow from
    NUMBER/trace.json, ...    a trace, as of irg generate
    NUMBER/rollout.json       record of the prompt, seed, thoughts with their tokens; "kept" rounds
    NUMBER/rollout.npz        images as drawn and as read back, x before and after stochastic steps

All trajectories have equally many rounds. Those after one that kept its image (`stopping`) keep it,
too, and have an empty thought; the trace does not show them.

A folder appears when it is complete. What is learned is read from files, also in the run that wrote
them, so a run that goes on after a kill learns the same.
"""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from irg_jax import flow, leases, sharding, storage
from irg_jax.generate import generator, irg, steps, stopping
from irg_jax.generate.context import FULL, in_layers
from irg_jax.reports import trace
from irg_jax.rl import sampler
from irg_jax.rl.settings import ImageTrack, RlSettings, seed_of

_BATCH, _ROW = "batch.json", "rollout"


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One trajectory."""

  record: dict  # of the prompt
  seed: int
  trajectory: irg.Trajectory  # rounds without latents
  start: int  # index of the first stochastic step
  # float32 [rounds, window + 1, P, C], x before each of them and after the last; 0 in kept rounds
  path: np.ndarray
  seen: tuple[dict, ...]  # each image but the last as it was read back: "latents", "patches" grids


class Walk:
  """Draws images with a window of stochastic steps, see `irg.Job.draw`; Euler steps elsewhere.

  Attributes:
    paths: of each round that any row drew, float32 [window + 1, B, P, C].
  """

  def __init__(self, track: ImageTrack, start: int):
    self._track, self._start, self.paths = track, start, []

  def __call__(self, job, ctx, number: int):
    s, track, start = job.settings, self._track, self._start
    shape = (len(job.seeds), int(np.prod(job.grid)), job.model.config.latent_dim)
    times, ctx = flow.schedule(s.steps, s.timestep_shift), in_layers(ctx)
    args = job.model, job.params["transformer"], ctx
    fixed = dict(grid=job.grid, special=job.tokenizer.special)
    euler = lambda x_BPC, first, stop: steps.denoise(
        *args, x_BPC, times, None, first, stop, views=(FULL,), **fixed)
    x_BPC = euler(job.noise("noise", number, shape), 0, start)
    keys_B = steps.row_keys(np.array(job.seeds, np.uint32), number, "noise")
    path = walk(*args, x_BPC, times, start, keys_B, track.noise, count=track.window, **fixed)
    self.paths.append(sharding.to_host(path))
    return euler(path[-1], start + track.window, s.steps - 1)


@functools.partial(jax.jit, static_argnames=("model", "count", "grid", "special"))
def walk(model, params, ctx, x_BPC, times_M, start, keys_B, noise, *, count, grid, special):
  """`count` stochastic steps from time `times_M[start]` on.

  Args:
    x_BPC, times_M, grid, special: as of `steps.denoise`.
    keys_B: a row's noise depends on its key and the step.
    noise: a of `sampler`.

  Returns:
    float32 [count + 1, B, P, C]: x before each step, and after the last one.
  """
  def step(x_BPC, i):
    v_BPC = steps.velocities(model, params, ctx, x_BPC, times_M[i], grid=grid, special=special,
                             views=(FULL,))["full"]
    drawn = lambda key: jax.random.normal(jax.random.fold_in(key, i + 1), x_BPC.shape[1:])
    after = sampler.step(x_BPC, v_BPC, times_M[i], times_M[i + 1], noise, jax.vmap(drawn)(keys_B))
    return after, after

  x_BPC = x_BPC.astype(jnp.float32)
  after = lax.scan(step, x_BPC, start + jnp.arange(count))[1]
  return jnp.concatenate([x_BPC[None], after])


def window_start(settings: RlSettings, iteration: int) -> int:
  """Index of the first stochastic step of an iteration's images."""
  last = settings.image.among - settings.image.window
  return int(np.random.default_rng([settings.seed, iteration, 1]).integers(last + 1))


def sample(loaded: generator.Generator, settings: RlSettings, generation, records, iteration: int,
           folder, identity: str, say=lambda _: None) -> list[Rollout]:
  """The trajectories of an iteration, `settings.group` of each record; made where they are missing.

  Args:
    loaded: the policy.
    generation: `settings.rollout.settings` of the checkpoint's.
    folder: of the iteration.
    identity: digest of what the policy and the records follow from.
    say: told what is made.
  """
  rows = [record for record in records for _ in range(settings.group)]
  seeds = [seed_of(settings.seed, iteration, i, len(rows)) for i in range(len(rows))]
  size, found = min(settings.rollout.batch_size, len(rows)), []
  storage.remove_partials(folder)
  for numbers in generator.batches(len(rows), size):
    place = storage.path(folder) / f"{numbers[0]:05}"
    if not _is_complete(place, identity):
      storage.remove_folder(place)
      say(f"trajectories {numbers[0] + 1} to {numbers[-1] + 1} of {len(rows)}")
      some = [[x[i] for i in numbers] for x in (rows, seeds)]
      made = _sample_batch(loaded, settings, generation, *some, iteration, size)
      with leases.new_folder(place) as partial:
        for number, (rollout, record) in zip(numbers, made):
          trace.write_trace(partial / f"{number:05}", record)
          _write(partial / f"{number:05}", rollout)
        storage.write_json(partial / _BATCH, {"identity": identity})
    found += [read(place / f"{number:05}") for number in numbers]
  return found


def read(folder) -> Rollout:
  """Reads a trajectory."""
  folder = storage.path(folder)
  told = storage.read_json(folder / f"{_ROW}.json")
  arrays = np.load(io.BytesIO(storage.read_file(folder / f"{_ROW}.npz")))
  thoughts = [irg.Thought(**thought | {"ids": tuple(thought["ids"])})
              for thought in told["thoughts"]]
  rounds = [irg.Round(thought, None, image, {}, kept=kept) for thought, image, kept in zip(
      thoughts, arrays["images"], told.get("kept", [False] * len(thoughts)))]
  seen = tuple({"latents": latents, "patches": patches}
               for latents, patches in zip(arrays["latents"], arrays["patches"]))
  return Rollout(told["record"], told["seed"], irg.Trajectory(told["record"]["prompt"], rounds),
                 told["start"], arrays["path"], seen)


def _is_complete(place, identity):
  try:
    return leases.is_finished(place) and storage.read_json(place / _BATCH)["identity"] == identity
  except (FileNotFoundError, ValueError, LookupError):
    return False


def _sample_batch(loaded, settings, generation, records, seeds, iteration, size):
  """[(rollout, record of its trace)] of trajectories sampled side by side."""
  start, prompts = window_start(settings, iteration), [r["prompt"] for r in records]
  draw = Walk(settings.image, start) if settings.image.weight else None
  prompt = loaded.defaults.system_prompt
  drawn = loaded.batch(prompts, seeds, generation, prompt, size=size, draw=draw)
  whole = [_filled(trajectory, generation.rounds) for trajectory in drawn]
  seen = _read_back(loaded, generation, whole, seeds, size)
  made = []
  for i, (record, seed, trajectory) in enumerate(zip(records, seeds, whole)):
    path = (_path(draw.paths, i, trajectory.rounds) if draw else
            np.zeros((len(trajectory.rounds), 0, 0, 0), np.float32))
    own = tuple({name: x[i] for name, x in images.items()} for images in seen)
    made.append((Rollout(record, seed, trajectory, start, path, own),
                 loaded.record(drawn[i], generation, prompt, seed, size)))
  return made


def _filled(trajectory, count):
  """The trajectory with `count` rounds: after the last one its image again, without a thought."""
  rounds = trajectory.rounds
  again = dataclasses.replace(rounds[-1], thought=irg.Thought())
  return dataclasses.replace(trajectory, rounds=stopping.filled([*rounds, again], count)[:count])


def _path(paths, row, rounds):
  """`Rollout.path` of a row, from `Walk.paths`."""
  # A row that stopped is computed while others draw, and never seen; without others it is not.
  none = np.zeros_like(paths[0][:, row])
  return np.stack([none if entry.kept else paths[number][:, row]
                   for number, entry in enumerate(rounds)])


def _read_back(loaded, generation, drawn, seeds, size):
  """Inputs of the model for each image but the last: {"latents", "patches"}, [B, Y, X, C] each."""
  seen = []
  with jax.set_mesh(loaded.mesh):
    job = irg.prepare(loaded.model, loaded.params, loaded.tokenizer, [""] * size,
                      seeds=stopping.filled(seeds, size), settings=generation)
    for number in range(generation.rounds - 1):
      found = irg.encode(job, [t.rounds[number].image for t in stopping.filled(drawn, size)],
                         number)
      grid = lambda x, sides: np.asarray(x).reshape(len(x), *sides, -1)
      seen.append({"latents": grid(sharding.to_host(found["latents_BPC"]), found["latent_grid"]),
                   "patches": grid(found["patches_BPC"], found["vit_grid"])})
  return seen


def _write(folder, rollout):
  stacked = lambda name: np.stack([x[name] for x in rollout.seen]) if rollout.seen else np.zeros(0)
  rounds = rollout.trajectory.rounds
  with storage.writer(folder / f"{_ROW}.npz") as file:
    np.savez(file, path=rollout.path, images=np.stack([r.image for r in rounds]),
             latents=stacked("latents"), patches=stacked("patches"))
  told = {"record": rollout.record, "seed": rollout.seed, "start": rollout.start,
          "thoughts": [dataclasses.asdict(r.thought) for r in rounds]}
  if any(r.kept for r in rounds):
    told["kept"] = [r.kept for r in rounds]
  (folder / f"{_ROW}.json").write_text(json.dumps(told), encoding="utf-8")


def forget(folder, iteration: int, keep: int) -> None:
  """Removes the trajectories of all but the newest `keep` iterations; 0 keeps all."""
  for path in storage.path(folder).glob("[0-9]*") if keep else ():
    if int(path.name) <= iteration - keep:
      storage.remove_folder(path)


def iteration_folder(out, iteration: int):
  """The folder of an iteration's trajectories in the folder of a run."""
  return storage.path(out) / "rollouts" / f"{iteration:06}"
