"""One `irg generate`, from inputs to files: check everything, read weights, generate, write."""

import contextlib
import dataclasses
import pathlib
import sys

from irg_jax import runs, sharding, weights
from irg_jax.generate import generator, prompts
from irg_jax.generate.settings import Settings, read_defaults
from irg_jax.images import read_image
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
  defaults = read_defaults(inputs.checkpoint)
  readings = [defaults.read(p, inputs.settings, bool(images)) for p in inputs.prompts]
  generator.check_lengths(config, tokenizer, inputs.settings, inputs.system_prompt,
                          [reading.text for reading in readings], images)
  for line in prompts.notes(defaults.prompts, inputs.prompts, readings):
    print(line, file=sys.stderr)
  mesh, entries = sharding.generation_mesh(inputs.mesh, config.llm), []
  size = min(inputs.batch_size, count)
  with held(inputs), Progress() as progress:
    loaded = generator.load(inputs.checkpoint, mesh=mesh, dtype=inputs.dtype,
                            attention=inputs.attention, on_progress=progress)
    for rows in generator.batches(count, size):
      if count > 1:
        numbers = f"s {rows[0] + 1} to {rows[-1] + 1}" if len(rows) > 1 else f" {rows[0] + 1}"
        progress.prefix = f"prompt{numbers} of {count}: "
      drawn = loaded.batch(
          [inputs.prompts[i] for i in rows], [inputs.seed + i for i in rows], inputs.settings,
          inputs.system_prompt, size=size, images=images, on_progress=progress)
      entries += [trace.write_trace(folders[i], loaded.record(
          t, inputs.settings, inputs.system_prompt, inputs.seed + i, inputs.batch_size, images,
          inputs.images)) for i, t in zip(rows, drawn)]
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


def _trace_folders(inputs):
  """`out` itself for one prompt, out/001, out/002, ... for several."""
  count = len(inputs.prompts)
  width = max(3, len(str(count)))
  return [inputs.out / f"{i:0{width}}" for i in range(1, count + 1)] if count > 1 else [inputs.out]
