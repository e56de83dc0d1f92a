"""Generation of a benchmark's images: those that are missing, each with a trace.

  OUT/run.json        settings; a start with others is refused
  OUT/roundN/...      images where the official scorer expects them, every round under its own root
  OUT/traces/...      thoughts and seeds, a JSON file an image
  OUT/cells/...       images of a grid until it is complete
  OUT/.aside/...      files being written, each renamed into its place when it is complete; in a
                      bucket, where objects appear whole, the lock alone

The unit of work is an image with all its rounds. Its files come first and its trace last, so an
image with a trace is done, and a start after a kill at any time generates only the others.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
import typing

import einops
import jax
import numpy as np

from irg_jax import runs, sharding, storage, weights
from irg_jax.evaluate import base
from irg_jax.evaluate.score import RUN
from irg_jax.generate import generator, irg, stopping
from irg_jax.generate.context import plan_cache
from irg_jax.generate.settings import Settings, read_defaults, with_new
from irg_jax.images import encode_image, read_image
from irg_jax.progress import Progress
from irg_jax.tokenizer import load_tokenizer
from irg_jax.weights import peft

# Losses of the images' own format would be judged as the model's.
_FORMATS = {".png": {"format": "PNG"}, ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
            ".webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}}
_ASIDE = ".aside"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """Everything a run needs, before any weights are read."""

  benchmark: base.Benchmark
  items: tuple[base.Item, ...]  # all prompts of the files; they belong to the run's identity
  selected: tuple[base.Item, ...]  # those to generate images for
  out: pathlib.Path  # folder of the run, new or to be continued
  checkpoint: pathlib.Path
  settings: Settings
  system_prompt: str
  batch_size: int  # images generated side by side
  mesh: dict[str, int] | None = None  # sizes by axis name; None: all devices on one axis
  dtype: str | None = None  # of the activations
  attention: str = "auto"  # see `ModelConfig.attention`
  lora: pathlib.Path | None = None  # folder of adapters
  lora_scale: float = 1.0  # how much they count
  weights: str | None = None  # as of `generator.load`
  process_id: int = 0  # this process takes every num_processes-th prompt
  num_processes: int = 1
  draw: typing.Callable = generator.Generator.batch  # another one for an ablation


class Result(typing.NamedTuple):
  """The outcome of this process's share."""

  generated: int  # images of now
  kept: int  # images that were there
  failed: list[str]  # "ITEM, image N, round N" of every image that could not be generated


class OutFolder:
  """Writes complete files into `out`, which any number of processes may share."""

  def __init__(self, out: pathlib.Path, aside: pathlib.Path):
    self.out, self._aside, self._there = out, aside, base.listing(out)
    self._new, self._traces = set(), {}

  def write(self, relative, data: bytes) -> None:
    """Writes a file atomically."""
    path = self.out / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(path, data, self._aside)
    self._new.add(path)

  def write_image(self, relative: pathlib.PurePath, image: np.ndarray) -> None:
    """Writes an RGB image in the format of its name."""
    self.write(relative, encode_image(image, **_FORMATS[relative.suffix]))

  def remove(self, relative) -> None:
    """Removes a folder and all that is in it."""
    storage.remove_folder(self.out / relative)

  def exists(self, relative) -> bool:
    return self.out / relative in self._new or self._there(relative)

  def trace(self, item: base.Item, image: int) -> dict | None:
    """`base.read_trace`, read once: nobody changes the trace of an image that is done."""
    key = item.id, image
    if key not in self._traces and self.exists(base.trace_path(item, image)):
      self._traces[key] = base.read_trace(self.out, item, image)
    return self._traces.get(key)


def generate_images(request: Request) -> Result:
  """Generates the missing images. Errors are raised before the weights are read, where possible."""
  config = weights.read_config(request.checkpoint)
  request.settings.validate(config)
  read_defaults(request.checkpoint).check(request.settings)
  tokenizer = load_tokenizer(request.checkpoint, config.llm.vocab_size)
  _check_prompts(request, tokenizer)
  plan_cache(config, request.settings, len(tokenizer.encode(request.system_prompt)))
  storage.check_output_folder(request.out)
  mesh = sharding.generation_mesh(request.mesh, config.llm)
  process = f"{request.process_id}-of-{request.num_processes}"
  share = request.selected[request.process_id::request.num_processes]
  rows = [(item, image) for item in share for image in range(item.images)]
  notes = {"checkpoint": str(request.checkpoint), "batch_size": request.batch_size,
           "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
           "versions": generator.versions()}
  with open_run(request.out, identity(request), notes, process) as folder:
    done = lambda: sum(_is_done(request, folder, *row) for row in rows)
    before = done()
    if before < len(rows):
      with Progress() as progress:
        loaded = generator.load(request.checkpoint, mesh=mesh, dtype=request.dtype,
                                attention=request.attention, lora=request.lora,
                                lora_scale=request.lora_scale, weights=request.weights,
                                on_progress=progress)
        _generate_batches(request, folder, loaded, rows, progress)
    for item in share:
      _paste(request, folder, item)
    failed = [f"{item.id}, image {image}, round {number}" for item, image in rows
              for number, entry in enumerate(folder.trace(item, image)["rounds"], 1)
              if entry["picture"] is None]
    return Result(done() - before, before, failed)


def identity(request: Request) -> dict:
  """The settings that decide a run's files; devices, processes and batch size do not."""
  lines = "".join(json.dumps([i.id, i.prompt, i.images]) + "\n" for i in request.items)
  stops = ({"satisfied": read_defaults(request.checkpoint).satisfied}
           if request.settings.until_satisfied else {})
  return {"benchmark": request.benchmark.name,
          "prompts": {"count": len(request.items),
                      "sha256": hashlib.sha256(lines.encode()).hexdigest()[:16]},
          "generation": dataclasses.asdict(request.settings) | stops,
          "system_prompt": request.system_prompt,
          "checkpoint": weights.fingerprint(
              request.checkpoint, request.lora and peft.Source(request.lora, request.lora_scale),
              request.weights),
          "dtype": request.dtype}


@contextlib.contextmanager
def open_run(out, settings: dict, notes: dict, process: str):
  """Yields the `OutFolder` of a new run, or of one with the same settings to be continued.

  Args:
    settings: JSON; what decides every file. Recorded, and compared from then on.
    notes: JSON; recorded beside them, not compared.
    process: names this process among those that share the folder; ValueError if it is at work.
  """
  out = storage.path(out)
  _check_run(out, settings)
  aside = out / _ASIDE / process
  with runs.locked(aside.with_suffix(".lock"), f"--out {out}: another process with the same "
                    "--process-id and --num-processes is at work in it"):
    if local := storage.is_local(out):
      aside.mkdir(exist_ok=True)
      for left in aside.iterdir():  # by a run that was killed
        left.unlink()
    runs.create(out / RUN, {"settings": settings, "notes": notes})
    _check_run(out, settings)  # another process may have been first
    yield OutFolder(out, aside)
    if local:
      shutil.rmtree(aside)
  if local:
    with contextlib.suppress(OSError):  # others are at work in it
      aside.parent.rmdir()


def _check_run(out, settings):
  """Raises ValueError unless `out` is new, empty, or a run with these settings."""
  runs.check_folder(out / RUN, "a run of irg eval generate")
  if (out / RUN).is_file():
    recorded = runs.read(out / RUN, ("settings",))["settings"]
    if "generation" in recorded:
      recorded["generation"] = with_new(recorded["generation"], settings["generation"])
    runs.check_same(recorded, settings, f"--out {out}")


def _check_prompts(request, tokenizer):
  limit = request.settings.max_prompt_tokens
  for item in request.selected:
    try:
      count = len(tokenizer.encode(item.prompt))
    except ValueError as e:
      raise ValueError(f"{item.benchmark} {item.id}: {e}") from e
    if count > limit:
      raise ValueError(f"{item.benchmark} {item.id}: the prompt has {count} tokens, more than the "
                       f"{limit} of max_prompt_tokens; give --config.max_prompt_tokens={count}")


def _is_done(request, folder, item, image):
  record = folder.trace(item, image)
  return record is not None and all(
      entry["picture"] is None or folder.exists(entry["picture"])
      or request.benchmark.grid and folder.exists(_cell_path(item, image, number))
      for number, entry in enumerate(record["rounds"], 1))


def _generate_batches(request, folder, loaded, rows, progress):
  # A batch's rows stay together whatever is missing: so a run that was stopped gives the very
  # bytes of one that was not, although a row's last bits may depend on the size of its batch.
  size = min(request.batch_size, len(rows))
  batches = [rows[i:i + size] for i in range(0, len(rows), size)]
  batches = [b for b in batches if not all(_is_done(request, folder, *row) for row in b)]
  total, done, ends = sum(map(len, batches)), 0, []
  for batch in batches:
    progress.prefix = f"{done} of {total} images{_left(ends, len(batches))}: "
    trajectories = request.draw(
        loaded, [item.prompt for item, _ in batch],
        [base.seed(item.benchmark, item.id, image) for item, image in batch],
        request.settings, request.system_prompt, size=size, on_progress=progress)
    for (item, image), trajectory in zip(batch, trajectories):
      if not _is_done(request, folder, item, image):
        reading = loaded.defaults.read(item.prompt, request.settings)
        _write(request, folder, item, image, trajectory, reading.record)
      _paste(request, folder, item)
    done += len(batch)
    ends.append(time.monotonic())


def _left(ends, batches):
  """The remaining time, by when batches ended. The first one compiles, so it does not count."""
  if len(ends) < 2:
    return ""
  minutes = (ends[-1] - ends[0]) / (len(ends) - 1) * (batches - len(ends)) / 60
  return f", {minutes / 60:.1f} h left" if minutes >= 90 else f", {minutes:.0f} min left"


def _write(request, folder, item, image, trajectory, reading):
  """Writes an image of every round, then the trace. An image that was kept is that of the rest."""
  rounds, last = [], len(trajectory.rounds)
  for number, r in enumerate(stopping.filled(trajectory.rounds, request.settings.rounds), 1):
    path = request.benchmark.image_path(item, image, number)
    for beside, data in request.benchmark.beside(item, number).items():
      if not folder.exists(beside):
        folder.write(beside, data)
    if not (fails := not np.isfinite(r.latents).all()):
      place = _cell_path(item, image, number) if request.benchmark.grid else path
      folder.write_image(place, r.image)
    rounds.append(generator.round_record(
        r if number <= last else dataclasses.replace(r, thought=irg.Thought(), seconds={}),
        request.settings.think and number <= last, None if fails else path.as_posix()))
  record = {"benchmark": item.benchmark, "id": item.id, "picture": image, "prompt": item.prompt,
            **reading, "seed": base.seed(item.benchmark, item.id, image), "rounds": rounds}
  folder.write(base.trace_path(item, image),
               (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _cell_path(item, image, round):
  return pathlib.PurePath("cells", f"round{round}", item.id, f"{image}.png")


def _paste(request, folder, item):
  """Writes the grids of a prompt when all their cells are there, then removes the cells."""
  traces = [folder.trace(item, image) for image in range(item.images)]
  if not (request.benchmark.grid and all(traces)):
    return
  # An image that failed is a black cell, which official code leaves out.
  black = np.zeros((request.settings.height, request.settings.width, 3), np.uint8)
  for number in range(1, request.settings.rounds + 1):
    place = request.benchmark.image_path(item, 0, number)
    paths = [trace["rounds"][number - 1]["picture"] and _cell_path(item, image, number)
             for image, trace in enumerate(traces)]
    if not folder.exists(place):
      if not all(path is None or folder.exists(path) for path in paths):
        continue
      cells = [black if path is None else read_image(folder.out / path) for path in paths]
      folder.write_image(place, einops.rearrange(
          cells, "(row column) h w c -> (row h) (column w) c", row=2))
    folder.remove(_cell_path(item, 0, number).parent)
