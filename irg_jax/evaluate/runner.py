"""One `irg eval generate`: draws what is missing of a benchmark's images.

The unit of work is an image, of all its rounds. Its files come first and its trace last, so
an image with a trace is done, and a start after a kill at any time draws only the others.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import time

import jax
import numpy as np
from PIL import Image

from irg_jax import sharding, weights
from irg_jax.reports import trace
from irg_jax.evaluate import layout, run_folder
from irg_jax.evaluate.prompts import Item
from irg_jax.generate import irg
from irg_jax.generate import run as generate_run
from irg_jax.generate.settings import Settings
from irg_jax.generate.slots import plan_cache
from irg_jax.progress import Progress
from irg_jax.tokenizer import load_tokenizer

# Losses of the pictures' own format would be judged as the model's.
_FORMATS = {".png": {"format": "PNG"}, ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
            ".webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """Everything a run needs; nothing here has touched the weights.

  Attributes:
    items: all prompts of the files; they belong to the run's identity.
    selected: those of them to draw.
    out: folder of the run, new or gone on with.
    checkpoint, settings, system_prompt, dtype: as in `irg_jax.generate.request.Request`.
    batch_size: images drawn side by side.
    mesh: mesh sizes by axis name, or None for all devices on one axis.
    process_id, num_processes: this process draws every num_processes-th prompt.
  """

  items: tuple[Item, ...]
  selected: tuple[Item, ...]
  out: pathlib.Path
  checkpoint: pathlib.Path
  settings: Settings
  system_prompt: str
  batch_size: int
  mesh: dict[str, int] | None = None
  dtype: str | None = None
  process_id: int = 0
  num_processes: int = 1

  @property
  def benchmark(self) -> str:
    return self.items[0].benchmark


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run came to, of this process's share.

  Attributes:
    drawn, kept: images drawn now, and there already.
    failed: "ITEM, image N, round N" of every image that could not be drawn.
  """

  drawn: int
  kept: int
  failed: list[str]


def run_generate(request: Request) -> Result:
  """Draws the images that are not there yet.

  Raises:
    ValueError, OSError: with a message for the user; before the weights are read wherever
      that is possible.
  """
  config = weights.read_config(request.checkpoint)
  request.settings.validate(config)
  tokenizer = load_tokenizer(request.checkpoint, config.llm.vocab_size)
  _check_prompts(request, tokenizer)
  plan_cache(config, request.settings, len(tokenizer.encode(request.system_prompt)))
  trace.check_output_folder(request.out)
  mesh = sharding.make_mesh(request.mesh)
  process = f"{request.process_id}-of-{request.num_processes}"
  with run_folder.open_run(request.out, identity(request), _notes(request), process) as folder:
    batches = _open_batches(request, folder)
    before = _count_done(request, folder)
    if batches:
      with Progress() as progress, jax.set_mesh(mesh):
        model, params = generate_run.load_model(request.checkpoint, mesh, request.dtype, progress)
        _draw_batches(request, folder, model, params, tokenizer, batches, progress)
    for item in _share(request):
      _paste(request, folder, item)
    after = _count_done(request, folder)
    return Result(after - before, before, list(_failures(request, folder)))


def identity(request: Request) -> dict:
  """What decides every file of a run: not how many devices, processes or rows work on it."""
  lines = "".join(json.dumps([i.id, i.prompt, i.images]) + "\n" for i in request.items)
  settings = dataclasses.asdict(request.settings)
  return json.loads(json.dumps({
      "benchmark": request.benchmark,
      "prompts": {"count": len(request.items),
                  "sha256": hashlib.sha256(lines.encode()).hexdigest()[:16]},
      "generation": settings,
      "system_prompt": request.system_prompt,
      "checkpoint": run_folder.fingerprint(request.checkpoint),
      "dtype": request.dtype,
  }))


def read_trace(out, item: Item, image: int) -> dict | None:
  """The trace of an image, or None where it is not done.

  {"benchmark", "id", "picture", "prompt", "seed", "rounds": [{"think": str or None,
  "think_tokens", "hit_limit", "tokens_cut", "picture": path under `out`, or None if it
  failed, "seconds": of the whole batch by phase}]}
  """
  try:
    return json.loads((pathlib.Path(out) / layout.trace_path(item, image)).read_text("utf-8"))
  except FileNotFoundError:
    return None


def _notes(request):
  return {"checkpoint": str(request.checkpoint), "batch_size": request.batch_size,
          "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
          "versions": generate_run.versions()}


def _check_prompts(request, tokenizer):
  limit = request.settings.max_prompt_tokens
  for item in request.selected:
    count = len(tokenizer.encode(item.prompt))
    if count > limit:
      raise ValueError(f"{item.benchmark} {item.id}: the prompt has {count} tokens, more than the "
                       f"{limit} of max_prompt_tokens; give --config.max_prompt_tokens={count}")


def _share(request):
  """The prompts of this process."""
  return request.selected[request.process_id::request.num_processes]


def _open_batches(request, folder):
  """The batches in which an image is missing.

  A batch's rows stay together whatever is missing: so a run that was stopped gives the very
  bytes of one that was not, although a row's last bits may depend on the size of its batch.
  """
  rows = [(item, image) for item in _share(request) for image in range(item.images)]
  size = request.batch_size
  batches = [rows[i:i + size] for i in range(0, len(rows), size)]
  return [batch for batch in batches if not all(_is_done(request, folder, *row) for row in batch)]


def _count_done(request, folder):
  return sum(_is_done(request, folder, item, image)
             for item in _share(request) for image in range(item.images))


def _is_done(request, folder, item, image):
  record = read_trace(folder.out, item, image)
  return record is not None and all(
      entry["picture"] is None or folder.exists(entry["picture"])
      or request.benchmark == "oneig" and folder.exists(layout.cell_path(item, image, number))
      for number, entry in enumerate(record["rounds"], 1))


def _draw_batches(request, folder, model, params, tokenizer, batches, progress):
  total, drawn, ends = sum(map(len, batches)), 0, []
  size = min(request.batch_size, sum(item.images for item in _share(request)))
  for batch in batches:
    progress.prefix = f"{drawn} of {total} images{_left(ends, len(batches))}: "
    # A batch that is not full repeats its last row: another size would compile anew.
    padded = [*batch, *[batch[-1]] * (size - len(batch))]
    trajectories = irg.generate(
        model, params, tokenizer, [item.prompt for item, _ in padded],
        seeds=[layout.seed(item.benchmark, item.id, image) for item, image in padded],
        settings=request.settings, system_prompt=request.system_prompt, on_progress=progress)
    for (item, image), trajectory in zip(batch, trajectories):
      if not _is_done(request, folder, item, image):
        _write(request, folder, item, image, trajectory)
      _paste(request, folder, item)
    drawn += len(batch)
    ends.append(time.monotonic())


def _left(ends, batches):
  """Time that is left, from when batches ended; the first one compiles and says nothing."""
  if len(ends) < 2:
    return ""
  minutes = (ends[-1] - ends[0]) / (len(ends) - 1) * (batches - len(ends)) / 60
  return f", {minutes / 60:.1f} h left" if minutes >= 90 else f", {minutes:.0f} min left"


def _write(request, folder, item, image, trajectory):
  """The files of an image, its trace last."""
  thinks, rounds = request.settings.think, []
  for number, r in enumerate(trajectory.rounds, 1):
    path = layout.image_path(item.benchmark, item, image, number)
    if item.benchmark in layout.SAMPLES and not folder.exists(layout.metadata_path(item, number)):
      folder.write(layout.metadata_path(item, number), json.dumps(item.extra).encode())
    fails = not np.isfinite(r.latents).all()
    if not fails:
      grids = item.benchmark == "oneig"
      place = layout.cell_path(item, image, number) if grids else path
      folder.write(place, _encoded(r.image, place.suffix))
    rounds.append({
        "think": r.thought.text if thinks else None, "think_tokens": len(r.thought.ids),
        "hit_limit": r.thought.hit_limit, "tokens_cut": r.thought.cut,
        "picture": None if fails else path.as_posix(), "seconds": r.seconds})
  record = {"benchmark": item.benchmark, "id": item.id, "picture": image, "prompt": item.prompt,
            "seed": layout.seed(item.benchmark, item.id, image), "rounds": rounds}
  folder.write(layout.trace_path(item, image),
               (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _paste(request, folder, item):
  """Makes the grids of one of OneIG's prompts once all its cells are there, then drops those."""
  if item.benchmark != "oneig":
    return
  records = [read_trace(folder.out, item, image) for image in range(item.images)]
  if not all(records):
    return
  cells = [[layout.cell_path(item, image, number) for image in range(item.images)]
           for number in range(1, request.settings.rounds + 1)]
  for number, paths in enumerate(cells, 1):
    fails = [record["rounds"][number - 1]["picture"] is None for record in records]
    place = layout.image_path("oneig", item, 0, number)
    if folder.exists(place) or not all(f or folder.exists(p) for f, p in zip(fails, paths)):
      continue
    images = [None if f else np.array(Image.open(folder.out / p)) for f, p in zip(fails, paths)]
    whole = layout.grid(images, request.settings.height, request.settings.width)
    folder.write(place, _encoded(whole, place.suffix))
  if all(folder.exists(layout.image_path("oneig", item, 0, n + 1)) for n in range(len(cells))):
    for paths in cells:
      shutil.rmtree((folder.out / paths[0]).parent, ignore_errors=True)


def _failures(request, folder):
  for item in _share(request):
    for image in range(item.images):
      record = read_trace(folder.out, item, image) or {"rounds": ()}
      for number, entry in enumerate(record["rounds"], 1):
        if entry["picture"] is None:
          yield f"{item.id}, image {image}, round {number}"


def _encoded(image, suffix):
  data = io.BytesIO()
  Image.fromarray(image).save(data, **_FORMATS[suffix])
  return data.getvalue()
