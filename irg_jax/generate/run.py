"""One `irg generate`, from inputs to files: check everything, read weights, generate, write."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import sys

import jax

from irg_jax import runs, sharding, weights
from irg_jax.generate import irg
from irg_jax.generate.context import plan_cache
from irg_jax.generate.settings import Settings, read_defaults
from irg_jax.images import read_image
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.progress import Progress
from irg_jax.reports import trace
from irg_jax.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """Inputs of one `irg generate`."""

  checkpoint: pathlib.Path
  prompts: tuple[str, ...]  # one trace each; prompt number i has the seed `seed + i`
  images: tuple[pathlib.Path, ...]  # image files that every prompt edits, in the order to read
  out: pathlib.Path  # folder of the results; it may not exist yet
  settings: Settings
  system_prompt: str  # read before every prompt; may be empty
  seed: int
  batch_size: int  # prompts generated side by side
  mesh: dict[str, int] | None  # sizes by axis name; None: `sharding.generation_mesh`
  dtype: str | None  # of the activations; None: the checkpoint's own
  attention: str = "auto"  # see `ModelConfig.attention`


def run_generate(inputs: Inputs) -> None:
  """Generates the images of every prompt, and writes each trace as soon as it is complete.

  ValueError and OSError have a message for the user. What can be checked before the weights are
  read is checked then, before anything is written.
  """
  count, folders = len(inputs.prompts), _trace_folders(inputs)
  for folder in folders:
    trace.check_trace_folder(folder)
  config = weights.read_config(inputs.checkpoint)
  inputs.settings.validate(config)
  tokenizer = load_tokenizer(inputs.checkpoint, config.llm.vocab_size)
  images = [read_image(path) for path in inputs.images]
  _check_lengths(inputs, config, tokenizer, images)
  mesh, entries = sharding.generation_mesh(inputs.mesh, config.llm), []
  with held(inputs), Progress() as progress, jax.set_mesh(mesh):
    model, params = load_model(inputs.checkpoint, mesh, inputs.dtype, progress,
                               inputs.attention)
    for rows in batches(count, inputs.batch_size):
      if count > 1:
        numbers = f"s {rows[0] + 1} to {rows[-1] + 1}" if len(rows) > 1 else f" {rows[0] + 1}"
        progress.prefix = f"prompt{numbers} of {count}: "
      drawn = _generate(inputs, model, params, tokenizer, rows, images, progress)
      entries += [trace.write_trace(folders[i], _record(inputs, i, t, model.config.dtype, images))
                  for i, t in zip(rows, drawn)]
    if count > 1:
      trace.write_index(inputs.out, entries)
  for folder in folders:
    print(f"{folder}: {', '.join(p.name for p in sorted(folder.glob('round*.png')))}, trace.json")
  page = inputs.out / ("index.html" if count > 1 else "trace.html")
  print(f"open {page} to read thoughts and images side by side")


@contextlib.contextmanager
def held(inputs: Inputs):
  """Keeps other commands out of the folder of the results meanwhile.

  The folder of one prompt is to appear complete, so the lock of a new folder is beside it.
  """
  out, several = inputs.out.absolute(), len(inputs.prompts) > 1
  runs.remove_void(out.parent)
  with contextlib.ExitStack() as stack:
    for path, needed in ((out.parent / f".{out.name}.lock", not out.exists()),
                         (out / ".lock", several or out.exists())):
      if needed:
        stack.enter_context(runs.locked(
            path, f"--out {inputs.out}: another irg generate is at work in it"))
    yield


def load_model(checkpoint, mesh, dtype, progress,
               attention: str = "auto") -> tuple[UnifiedTransformer, dict]:
  """Reads the model and the parameters of a checkpoint onto the devices of `mesh`.

  `dtype` is that of parameters and arithmetic, None for the checkpoint's own, with bfloat16
  arithmetic for weights of 8 bits; `progress` is a `progress.Progress` or another function of a
  phase.
  """
  progress("read")
  dtype = dtype or read_defaults(checkpoint).dtype
  config, params = weights.load_checkpoint(
      checkpoint, dtype=dtype, compute_dtype=dtype,
      shardings_fn=lambda shapes: sharding.parameter_shardings(shapes, mesh))
  if dtype is None:  # bfloat16 weights are meant for bfloat16 arithmetic, as are those of 8 bits
    stored = params["transformer"]["embed"]["embedding"].dtype
    config = dataclasses.replace(config, dtype="bfloat16" if stored.itemsize == 1 else stored.name)
  return UnifiedTransformer(dataclasses.replace(config, attention=attention)), params


def batches(count: int, size: int) -> list[range]:
  """Numbers of the prompts that run side by side: `batches(5, 2)` is 0-1, 2-3, 4."""
  return [range(i, min(i + size, count)) for i in range(0, count, size)]


def versions() -> dict[str, str]:
  """Versions of the packages that decide a result, by name."""
  found = {}
  for name in ("irg_jax", "jax", "jaxlib", "flax"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"  # a source tree on the path
  return found


def round_record(drawn: irg.Round, thinks: bool, image) -> dict:
  """The record of a round for `trace.json`; `image` stands for its image there."""
  return {"think": drawn.thought.text if thinks else None, "think_tokens": len(drawn.thought.ids),
          "hit_limit": drawn.thought.hit_limit, "tokens_cut": drawn.thought.cut, "picture": image,
          "seconds": drawn.seconds}


def _trace_folders(inputs):
  """`out` itself for one prompt, out/001, out/002, ... for several."""
  count = len(inputs.prompts)
  width = max(3, len(str(count)))
  return [inputs.out / f"{i:0{width}}" for i in range(1, count + 1)] if count > 1 else [inputs.out]


def _check_lengths(inputs, config, tokenizer, images):
  """Checks prompts and cache before the first batch costs anything, and notes unknown words."""
  settings, defaults = inputs.settings, read_defaults(inputs.checkpoint)
  limit = settings.max_prompt_tokens
  for number, prompt in enumerate(inputs.prompts, 1):
    count = _count(tokenizer, prompt, f"prompt {number}")
    if count > limit:
      raise ValueError(f"prompt {number} has {count} tokens, more than the {limit} that the cache "
                       f"is made for: shorten it, or give --config.max_prompt_tokens={count}")
    if note := defaults.about(prompt):
      print(f'note on "{prompt}": {note}', file=sys.stderr)
  sizes = [settings.vae_transform.size(*image.shape[1::-1])[::-1] for image in images]
  plan_cache(config, settings, _count(tokenizer, inputs.system_prompt, "system prompt"), sizes)


def _count(tokenizer, text, name):
  try:
    return len(tokenizer.encode(text))
  except ValueError as e:
    raise ValueError(f"{name}: {e}") from e


def _generate(inputs, model, params, tokenizer, rows, images, progress):
  # A short last batch repeats its last row: another batch size would compile again, and no row's
  # result depends on its neighbours.
  size = min(inputs.batch_size, len(inputs.prompts))
  padded = [*rows, *[rows[-1]] * (size - len(rows))]
  return irg.generate(
      model, params, tokenizer, [inputs.prompts[i] for i in padded],
      seeds=[inputs.seed + i for i in padded], settings=inputs.settings,
      system_prompt=inputs.system_prompt,
      images=[images] * size if images else None, on_progress=progress)[:len(rows)]


def _record(inputs, number, trajectory, dtype, images) -> dict:
  """The record of one prompt for `trace.write_trace`; seconds are those of its whole batch."""
  settings = dataclasses.asdict(inputs.settings) | {
      "batch_size": inputs.batch_size,
      "image": ", ".join(map(str, inputs.images)) or None, "dtype": dtype,
      "mesh": inputs.mesh, "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
  return {
      "prompt": trajectory.prompt, "system_prompt": inputs.system_prompt,
      "seed": inputs.seed + number, "checkpoint": str(inputs.checkpoint), "settings": settings,
      "versions": versions(),
      "sources": [inputs.settings.vae_transform(image) for image in images],
      "rounds": [round_record(r, inputs.settings.think, r.image) for r in trajectory.rounds]}
