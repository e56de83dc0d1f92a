"""Watching a run: what the moving average draws, and its losses on held-out records.

  OUT/samples.html          all evaluations, prompt by prompt, newest first
  OUT/samples/STAGE/STEP/   images, and evaluation.json with thoughts, losses and seconds

After every `eval_every` steps and at the end of a stage. An evaluation reads the state and changes
nothing of it; seeds, noise, records and sizes of batches are fixed, so it is the same on every mesh
but for rounding. Its folder appears complete. The line in log.jsonl comes last and says that it is
done: after a kill, an evaluation without a folder is made, one with a folder is logged from there.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import config as config_lib
from irg_jax import messages, storage
from irg_jax.generate import generator
from irg_jax.generate.settings import Defaults, Settings, check_prompts, read_defaults
from irg_jax.images import encode_image, read_image
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.reports import pages
from irg_jax.train import logs
from irg_jax.train.distributed import gather
from irg_jax.train.settings import STAGES, TrainSettings
from irg_jax.train.step import cast_kernels
from irg_jax.train.validation import Validation
from irg_jax.weights import lora

FOLDER, RECORD = "samples", "evaluation.json"
_LOSSES, _COSTS = ("loss", "ce", "mse"), ("losses", "images", "compiling")


@dataclasses.dataclass(frozen=True)
class Drawing:
  """Prompts and settings of the samples that the moving average draws."""

  prompts: tuple[str, ...]
  defaults: Defaults  # of generation

  @property
  def settings(self) -> Settings:
    return self.defaults.settings


@dataclasses.dataclass(frozen=True)
class Exam:
  """The prompts of `watch.benchmark` that are drawn, and what judges the images."""

  prompts: tuple[str, ...]
  seeds: tuple[int, ...]  # of the first image of each, as of `irg eval`
  right: Callable[[int, np.ndarray], bool]  # number of the prompt, image -> whether it shows it


def read_exam(settings: TrainSettings, drawing: Drawing, open_exam) -> Exam | None:
  """The `Exam` of the settings, or None; `open_exam`: (name, limit) -> Exam, from the command.

  ValueError where it cannot be drawn or judged.
  """
  name, size = settings.watch.benchmark, (drawing.settings.height, drawing.settings.width, 3)
  if not settings.eval_every or not name:
    return None
  try:
    if open_exam is None:
      raise ValueError("it is for irg train alone")
    exam = open_exam(name, settings.watch.benchmark_limit)
    exam.right(0, np.zeros(size, np.uint8))  # a benchmark may want images of one size
  except ValueError as e:
    raise ValueError(f"config field 'watch.benchmark' is {name!r}: {e}") from e
  return exam


def read_drawing(settings: TrainSettings, base) -> Drawing:
  """Reads and checks what `settings.watch` names; `base` is the checkpoint to start from.

  ValueError names the file, the prompt or the setting.
  """
  watch, defaults, prompts = settings.watch, read_defaults(base), ()
  if not settings.eval_every or not (watch.prompts or watch.benchmark):
    return Drawing((), defaults)
  try:
    if watch.prompts:
      lines = storage.read_text(watch.prompts).split("\n")
      prompts = check_prompts([line for line in lines if line.strip()])
  except (OSError, ValueError) as e:
    raise ValueError(f"config field 'watch.prompts' is {watch.prompts!r}, but must be a text with "
                     f"a prompt on each line ({messages.message(e)})") from e
  drawing = config_lib.read(defaults.settings, watch.generate or None)
  drawing.validate(settings.model)
  if drawing.until_satisfied:
    raise ValueError("config field 'until_satisfied' is true, but evaluations while training draw "
                     "all rounds: set it to false in a file watch.generate")
  return Drawing(prompts, dataclasses.replace(defaults, settings=drawing))


def places(settings: TrainSettings, out: pathlib.Path, profiled: int) -> str:
  """A line that says where curves, images and traces are, and what opens them."""
  first = settings.profile_at
  trace = f"no profiler trace; --config.profile_at=N makes one of {profiled} steps"
  if first:
    trace = (f"profiler trace from step {first} on: {out / 'STAGE' / 'profile'}, whose "
             "*.trace.json.gz ui.perfetto.dev opens")
  images = f"images: {out / 'samples.html'}; " if settings.eval_every else ""
  return (f"{images}curves: tensorboard --logdir {out / 'tensorboard'} (pip install tensorboard); "
          f"{trace}")


class Watch:
  """Evaluates one stage: call it after each step, in all processes.

  Args:
    run: `run.Run`.
    log: `logs.Log` of the stage.
    evaluated: steps whose evaluations are logged already.
  """

  def __init__(self, run, stage: str, log, evaluated=()):
    self._run, self._stage, self._log, self._done = run, stage, log, set(evaluated)
    self._settings, self._drawing, self._exam = run.settings, run.drawing, run.exam
    drawing, asked = run.drawing, [*run.drawing.prompts, *(run.exam.prompts if run.exam else ())]
    if asked:  # an evaluation that cannot be drawn would end the run hours later
      texts = [drawing.defaults.read(prompt, drawing.settings).text for prompt in asked]
      generator.check_lengths(self._settings.model, run.tokenizer, drawing.settings,
                              drawing.defaults.system_prompt, texts)
    model = dataclasses.replace(self._settings.model, remat="none")
    self._model = UnifiedTransformer(model)
    self._validate = Validation(
        self._settings, self._settings.stages[stage], run.held_out, run.tokenizer, run.encoder,
        self._model, run.mesh)

    self._cast = jax.jit(functools.partial(cast, self._settings, run.mesh))

  def due(self, step: int) -> bool:
    """Whether there is an evaluation after a step that is not logged yet."""
    every, end = self._settings.eval_every, self._settings.stages[self._stage].steps
    return bool(every and step and (step % every == 0 or step == end) and step not in self._done)

  def __call__(self, step: int, ema, base=None) -> None:
    """Evaluates the moving average after a step, if that is due; `base` is that of adapters."""
    if not self.due(step):
      return
    with self._run.clock("evaluating"):
      self._log.flush()
      self._log.busy("evaluating")
      folder = self._run.out / FOLDER / self._stage / str(step)
      first = jax.process_index() == 0
      record = self._kept(folder) if first else None
      if not gather({"kept": record is not None} if first else {})["kept"]:
        record = self._evaluate(step, ema, base or {}, folder)
      if first:
        write_page(self._run.out)
        self._publish(step, folder, record)
      self._done.add(step)

  def _identity(self) -> str:
    """Digest of the settings that an evaluation follows from, beside the weights."""
    s, drawing, free = self._settings, self._drawing, ("path", "workers", "max_rejected")
    data = {name: x for name, x in dataclasses.asdict(s.data).items() if name not in free}
    known = [data, dataclasses.asdict(s.stages[self._stage]), dataclasses.asdict(drawing)]
    watch = s.watch.batch_size, s.watch.records, s.watch.benchmark, s.watch.benchmark_limit
    text = json.dumps([*known, s.seed, *watch], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def _kept(self, folder):
    """The record of an evaluation that was complete before a kill; None without one."""
    try:
      record = storage.read_json(folder / RECORD)
      images = [x["picture"] for sample in record["samples"] for x in sample["rounds"]]
      same = record["identity"] == self._identity()
      return record if same and all((folder / name).is_file() for name in images) else None
    except (OSError, ValueError, KeyError, TypeError):
      return None

  def _evaluate(self, step, ema, base, folder) -> dict:
    """Makes an evaluation; the first process writes its folder."""
    seconds, lap = {}, self._run.clock.lap
    with lora.applied(1.0):
      with lap("losses", seconds):
        params = lora.beside(base, self._cast(ema))
        losses = {name: float(f"{x:.9g}") for name, x in self._validate(params).items()}
      with lap("images", seconds):
        samples, images = self._draw(params)
      shares = {}
      if self._exam:
        with lap("benchmark", seconds):
          shares = self._examine(params)
    record = {"stage": self._stage, "step": step, "identity": self._identity(), "losses": losses,
              "records": self._validate.samples, "samples": samples, "seconds": seconds,
              "benchmark": shares}
    if jax.process_index() == 0:
      with storage.atomic_files(folder) as partial:
        for name, image in images.items():
          (partial / name).write_bytes(encode_image(image))
        storage.write_json(partial / RECORD, record)
    return record

  def _draw(self, params):
    """(records of the samples, images by file name), drawn batch by batch."""
    drawing, samples, images = self._drawing, [], {}
    seeds = [(self._settings.seed + i) % 2**32 for i in range(len(drawing.prompts))]
    for i, trajectory in self._trajectories(params, drawing.prompts, seeds):
      named = {f"{i + 1}_{n}.png": x.image for n, x in enumerate(trajectory.rounds, 1)}
      images |= named
      reading = drawing.defaults.read(trajectory.prompt, drawing.settings)
      samples.append({"prompt": trajectory.prompt, **reading.record, "seed": seeds[i], "rounds": [
          generator.round_record(x, drawing.settings.think, name)
          for x, name in zip(trajectory.rounds, named)]})
    return samples, images

  def _examine(self, params) -> dict[str, float]:
    """The share of right images of the benchmark by round, "round1" and so on."""
    right = [[np.isfinite(x.latents).all() and self._exam.right(i, x.image)
              for x in trajectory.rounds]
             for i, trajectory in self._trajectories(params, self._exam.prompts, self._exam.seeds)]
    return {f"round{n}": float(np.mean(found)) for n, found in enumerate(zip(*right), 1)}

  def _trajectories(self, params, prompts, seeds):
    """Yields (number, trajectory) of prompts, drawn batch by batch."""
    if not prompts:
      return
    run, defaults = self._run, self._drawing.defaults
    vae = jax.device_put(run.vae, NamedSharding(run.mesh, PartitionSpec()))
    loaded = generator.Generator(run.base, "", defaults, run.tokenizer, run.mesh, self._model,
                                 {"transformer": params, "vae": vae})
    size = min(self._settings.watch.batch_size, len(prompts))
    for rows in generator.batches(len(prompts), size):
      yield from zip(rows, loaded.batch(
          [prompts[i] for i in rows], [seeds[i] for i in rows], defaults.settings,
          defaults.system_prompt, size=size))

  def _publish(self, step, folder, record):
    """Curves, images and texts to all places, then the line in log.jsonl."""
    values = {f"validation/{name}": x for name, x in record["losses"].items()}
    values |= {f"benchmark/{self._settings.watch.benchmark}/{name}": x
               for name, x in record["benchmark"].items()}
    for number, sample in enumerate(record["samples"], 1):
      for n, entry in enumerate(sample["rounds"], 1):
        values[f"samples/{number}/round{n}"] = read_image(folder / entry["picture"])
      thoughts = [f"round {n}: {entry['think']}" for n, entry in enumerate(sample["rounds"], 1)
                  if entry["think"] is not None]
      values[f"samples/{number}/thoughts"] = "\n\n".join([sample["prompt"], *thoughts])
    self._log.evaluation(step, values, self._line(step, record), evaluation={
        "losses": record["losses"], "records": len(record["records"]),
        "images": len(record["samples"]), "benchmark": record["benchmark"],
        "seconds": record["seconds"]})

  def _line(self, step, record):
    seconds, losses = record["seconds"], record["losses"]
    shown = ", ".join(f"{name} {losses[name]:.4f}" for name in _LOSSES
                      if name in losses) or "no held-out records (data.held_out)"
    shown += "".join(f", {self._settings.watch.benchmark} {name} {x:.3f}"
                     for name, x in record["benchmark"].items())
    page = f"; images: {self._run.out / 'samples.html'}" if record["samples"] else ""
    return (f"{self._stage}, step {step}: moving average evaluated in "
            f"{sum(seconds.values()):.1f} s "
            f"({', '.join(f'{name} {x:.1f}' for name, x in seconds.items())}): {shown}{page}")


def cast(settings: TrainSettings, mesh, ema):
  """Parameters to evaluate with: matrices in the compute dtype, adapters with their scale."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.tree.map_with_path(
        lambda path, x: settings.lora.scale * x if path[-1].key == lora.B else x,
        cast_kernels(ema, settings.model.dtype))


def open_watch(run, stage: str, log) -> Watch:
  """The `Watch` of a stage; what the log holds already is not made again."""
  seen = {"steps": sorted(logs.made(log.folder, stage)[1])} if jax.process_index() == 0 else {}
  return Watch(run, stage, log, gather(seen)["steps"])


def write_page(out) -> None:
  """Writes samples.html from all evaluations in the folder of a run."""
  out = storage.path(out)
  found = [storage.read_json(path) for path in out.glob(f"{FOLDER}/*/*/{RECORD}")]
  found.sort(key=lambda record: (STAGES.index(record["stage"]), record["step"]), reverse=True)
  prompts, rows = {}, []
  for record in found:
    name = f"{record['stage']}, step {record['step']}"
    losses = [record["losses"].get(loss) for loss in _LOSSES]
    rows.append([name, *("" if x is None else f"{x:.4f}" for x in losses),
                 *(f"{record['seconds'][part]:.1f} s" for part in _COSTS),
                 ", ".join(f"{name} {x:.3f}" for name, x in record.get("benchmark", {}).items())])
    for sample in record["samples"]:
      folder = f"{FOLDER}/{record['stage']}/{record['step']}"
      rounds = [x | {"src": f"{folder}/{x['picture']}"} for x in sample["rounds"]]
      prompts.setdefault(sample["prompt"], []).append({"name": name, "rounds": rounds})
  shown = next(iter(prompts.values()), None)
  storage.write_text(out / "samples.html", pages.render(
      "samples", head=["", *_LOSSES, *(f"{part} took" for part in _COSTS), "benchmark"], rows=rows,
      prompts=prompts, small=bool(shown) and pages.small(out / shown[0]["rounds"][0]["src"])))
