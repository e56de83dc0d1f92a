"""One `irg generate`, from inputs to files: check everything, read weights, generate, write."""

import contextlib
import dataclasses
import os
import pathlib
import sys

from irg_jax import runs, sharding, storage, weights
from irg_jax.generate import generator, irg, prompts, stopping
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
  lora: pathlib.Path | None = None  # folder of adapters
  lora_scale: float = 1.0  # how much they count
  weights: str | None = None  # as of `generator.load`


def run_generate(inputs: Inputs) -> None:
  """Generates the images of every prompt; writes each thought and image as soon as it exists.

  What an earlier run with the same inputs left in the folder is read, not made again.
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
  defaults.check(inputs.settings)
  readings = [defaults.read(p, inputs.settings, bool(images)) for p in inputs.prompts]
  generator.check_lengths(config, tokenizer, inputs.settings, inputs.system_prompt,
                          [reading.text for reading in readings], images)
  for line in prompts.notes(defaults.prompts, inputs.prompts, readings):
    print(line, file=sys.stderr)
  mesh, entries = sharding.generation_mesh(inputs.mesh, config.llm), []
  with held(inputs), _kept(inputs), Progress() as progress:
    loaded = generator.load(inputs.checkpoint, mesh=mesh, dtype=inputs.dtype,
                            attention=inputs.attention, lora=inputs.lora,
                            lora_scale=inputs.lora_scale, weights=inputs.weights,
                            on_progress=progress)
    for rows in generator.batches(count, min(inputs.batch_size, count)):
      if count > 1:
        numbers = f"s {rows[0] + 1} to {rows[-1] + 1}" if len(rows) > 1 else f" {rows[0] + 1}"
        progress.prefix = f"prompt{numbers} of {count}: "
      entries += _run_batch(inputs, loaded, rows, [folders[i] for i in rows], images, progress)
    if count > 1:
      trace.write_index(inputs.out, entries)
  for folder in folders:
    print(f"{folder}: {', '.join(p.name for p in sorted(folder.glob('round*.png')))}, trace.json")
  page = inputs.out / ("index.html" if count > 1 else "trace.html")
  print(f"open {page} to read thoughts and images side by side")


@contextlib.contextmanager
def held(inputs: Inputs):
  """Keeps other commands out of the folder of the results meanwhile.

  The folder of one prompt is to appear with its first files, so its lock is beside it. One that
  exists may be a mount point, with nothing writable beside it. In a bucket it is in the folder.
  """
  out, several = inputs.out.absolute(), len(inputs.prompts) > 1
  runs.remove_void(out.parent)
  several |= not storage.is_local(out)
  beside = storage.is_local(out) and (not out.exists() or os.access(out.parent, os.W_OK))
  with contextlib.ExitStack() as stack:
    for path, needed in ((out.parent / f".{out.name}.lock", beside),
                         (out / ".lock", several or out.exists())):
      if needed:
        stack.enter_context(runs.locked(
            path, f"--out {inputs.out}: another irg generate is at work in it"))
    yield


@contextlib.contextmanager
def _kept(inputs):
  """Says after an interrupt where the results are and how to go on."""
  try:
    yield
  except KeyboardInterrupt:
    if any(inputs.out.rglob("trace.json")):
      print(f"what was made is in {inputs.out}; the same command with --out {inputs.out} goes on",
            file=sys.stderr)
    raise


def _run_batch(inputs, loaded, rows, folders, images, progress):
  """Generates the prompts of numbers `rows`, or the rest of them; returns entries of the index."""
  seeds = [inputs.seed + i for i in rows]
  record = lambda trajectory, seed: loaded.record(
      trajectory, inputs.settings, inputs.system_prompt, seed, inputs.batch_size, images,
      inputs.images)
  read = [trace.read_rounds(folder, record(irg.Trajectory(inputs.prompts[i], []), seed))
          for i, folder, seed in zip(rows, folders, seeds)]
  complete = [found[-1:] != [] and found[-1]["picture"] is not None
              and (len(found) == inputs.settings.rounds or found[-1].get("kept", False))
              for found in read]

  def write(trajectories, done=True):
    for whole, folder, seed, trajectory in zip(complete, folders, seeds, trajectories):
      if not whole:
        ends = done or trajectory.rounds[-1].kept
        trace.write_trace(folder, record(trajectory, seed) | (
            {} if ends else {"unfinished": True}))

  if not all(complete):  # rows stay together: a row's last bits may depend on the batch's size
    write(loaded.batch(
        [inputs.prompts[i] for i in rows], seeds, inputs.settings, inputs.system_prompt,
        size=min(inputs.batch_size, len(inputs.prompts)), images=[images] * len(rows),
        on_progress=progress,
        done=_common(read, loaded.tokenizer, inputs.settings),
        on_result=lambda trajectories: write(trajectories, done=False)))
  return list(map(trace.finish_trace, folders))


def _common(read, tokenizer, settings):
  """`done` of `irg.generate`: the rounds that all rows of a batch have, or have no more."""
  done = []
  read = [stopping.filled(found, settings.rounds) if found and found[-1].get("kept") else found
          for found in read]
  for entries in zip(*read):
    drawn = all(entry["picture"] is not None for entry in entries)
    if not (drawn or settings.think):
      break
    done.append([
        irg.Round(_thought(entry, tokenizer, settings), None,
                  entry["picture"] if drawn or entry.get("kept") else None, entry["seconds"],
                  entry.get("passes", 0), entry.get("kept", False)) for entry in entries])
    if not drawn:
      break
  return done


def _thought(entry, tokenizer, settings):
  if not settings.think:
    return irg.Thought()
  ids = tokenizer.encode(entry["think"])
  return irg.Thought(entry["think"], tuple(ids[: len(ids) - entry["tokens_cut"]]),
                     entry["hit_limit"], entry["tokens_cut"])


def _trace_folders(inputs):
  """`out` itself for one prompt, out/001, out/002, ... for several."""
  count = len(inputs.prompts)
  width = max(3, len(str(count)))
  return [inputs.out / f"{i:0{width}}" for i in range(1, count + 1)] if count > 1 else [inputs.out]
