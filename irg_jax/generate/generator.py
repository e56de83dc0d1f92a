"""`load`: a checkpoint that generates. The command line, the benchmarks and Python all use it."""

import dataclasses
import importlib.metadata
import pathlib

import jax
import numpy as np

from irg_jax import config as config_lib
from irg_jax import sharding, weights
from irg_jax.generate import irg
from irg_jax.generate.settings import SHIPPED, Defaults, Settings, expand, read_defaults
from irg_jax.images import read_image
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.reports import pages, trace
from irg_jax.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Result:
  """The outcome of one prompt. A notebook shows its thoughts and images side by side."""

  record: dict  # the trace, see `reports.trace`

  @property
  def prompt(self) -> str:
    return self.record["prompt"]

  @property
  def note(self) -> str | None:
    """A sentence on what the model cannot know of the prompt; None if there is nothing to say."""
    return self.record.get("note")

  @property
  def thoughts(self) -> list[str | None]:
    """The text before each image; None without thinking."""
    return [entry["think"] for entry in self.record["rounds"]]

  @property
  def images(self) -> list[np.ndarray]:
    """The image of each round, uint8 [height, width, 3]."""
    return [entry["picture"] for entry in self.record["rounds"]]

  @property
  def image(self) -> np.ndarray:
    """The last image."""
    return self.images[-1]

  def save(self, folder) -> None:
    """Writes images, trace.json and trace.html, as `irg generate --out FOLDER` does."""
    trace.write_trace(folder, self.record)

  def __repr__(self):
    return f"Result({self.prompt!r}, {len(self.images)} images)"

  def _repr_html_(self):
    return pages.render("notebook", trace=self.record, rounds=trace.with_pngs(self.record))


@dataclasses.dataclass(frozen=True)
class Generator:
  """A checkpoint on the devices of a mesh, with its settings; made by `load`."""

  checkpoint: pathlib.Path
  defaults: Defaults  # of the checkpoint
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  model: UnifiedTransformer
  params: dict = dataclasses.field(repr=False)

  @property
  def settings(self) -> Settings:
    """The checkpoint's settings of generation."""
    return self.defaults.settings

  def generate(self, prompts, *, images=(), seed=0, batch_size: int = 1, settings=None,
               system_prompt=None, on_progress=None, **changes):
    """Thinks and draws, as `irg generate` with the same flags does.

    Args:
      prompts: a prompt, or a list of them.
      images: images to edit, for all prompts: paths, or uint8 [height, width, 3].
      seed: prompt number i has the seed `seed + i`.
      batch_size: prompts that run side by side.
      settings: `Settings`; None: the checkpoint's.
      system_prompt: None: the checkpoint's.
      on_progress: see `irg.Job`.
      changes: fields of `Settings` to change, such as `rounds=3, text_scale=2.0, size=(64, 64)`
        (width, height), or `later={"renorm": "global"}`.

    Returns:
      A `Result`, or a list of them for a list of prompts.

    Raises:
      ValueError: prompts, images or settings that cannot work.
    """
    several = not isinstance(prompts, str)
    prompts, (settings, system_prompt) = (
        list(prompts) if several else [prompts], self._chosen(settings, system_prompt, changes))
    arrays, results = list(map(_read, images)), []
    for rows in batches(len(prompts), batch_size):
      drawn = self.batch(
          [prompts[i] for i in rows], [seed + i for i in rows], settings, system_prompt,
          size=min(batch_size, len(prompts)), images=arrays, on_progress=on_progress)
      results += [Result(self.record(
          t, settings, system_prompt, seed + i, batch_size, arrays,
          [x for x in images if isinstance(x, (str, pathlib.Path))])) for i, t in zip(rows, drawn)]
    return results if several else results[0]

  def edit(self, instruction: str, *images, **options):
    """Draws `images` (paths or arrays) anew as the instruction says; options of `generate`."""
    return self.generate(instruction, images=images, **options)

  def ask(self, question: str, *images, seed: int = 0, settings=None, system_prompt=None,
          **changes) -> str:
    """Answers in text: chat, or with `images` (paths or arrays) a question about them."""
    settings, system_prompt = self._chosen(settings, system_prompt, changes)
    with jax.set_mesh(self.mesh):
      answer, = irg.answer(
          self.model, self.params, self.tokenizer, [question],
          seeds=[seed], settings=settings, system_prompt=system_prompt,
          images=[list(map(_read, images))] if images else None)
    return answer.text

  def batch(self, prompts, seeds, settings: Settings, system_prompt: str, *, size: int,
            images=(), on_progress=None) -> list[irg.Trajectory]:
    """`irg.generate` for at most `size` prompts, padded to `size`.

    A short batch repeats its last row: another size would compile again, and no row's result
    depends on its neighbours. `images`, arrays, are for every row.
    """
    padded = lambda rows: [*rows, *[rows[-1]] * (size - len(rows))]
    with jax.set_mesh(self.mesh):
      return irg.generate(
          self.model, self.params, self.tokenizer, padded(prompts), seeds=padded(seeds),
          settings=settings, system_prompt=system_prompt,
          images=[images] * size if images else None, on_progress=on_progress)[:len(prompts)]

  def record(self, trajectory: irg.Trajectory, settings: Settings, system_prompt: str, seed: int,
             batch_size: int, images=(), paths=()) -> dict:
    """The record of a prompt for `trace.write_trace`; seconds are those of its whole batch."""
    shape = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
    used = dataclasses.asdict(settings) | {
        "batch_size": batch_size, "image": ", ".join(map(str, paths)) or None,
        "dtype": self.model.config.dtype, "mesh": shape or None,
        "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"}
    return {
        "prompt": trajectory.prompt, "system_prompt": system_prompt, "seed": seed,
        "checkpoint": str(self.checkpoint), "settings": used, "versions": versions(),
        "sources": [settings.vae_transform(image) for image in images],
        "rounds": [round_record(r, settings.think, r.image) for r in trajectory.rounds]}

  def _chosen(self, settings, system_prompt, changes):
    settings = config_lib.update(settings or self.settings, expand(changes))
    prompt = self.defaults.system_prompt if system_prompt is None else system_prompt
    return settings, prompt.strip()


def load(checkpoint=None, *, mesh=None, dtype: str | None = None, attention: str = "auto",
         on_progress=None) -> Generator:
  """Reads a checkpoint onto the devices.

  Args:
    checkpoint: folder in the published layout or Orbax; None: the mini world's in the package.
    mesh: a mesh, or sizes by axis name for `sharding.generation_mesh`; None: its default.
    dtype: of parameters and arithmetic; None: the checkpoint's own.
    attention: see `ModelConfig.attention`.
    on_progress: told that weights are being read, see `irg.Job`.

  Raises:
    ValueError: names the file that is missing or broken, and the mend.
  """
  checkpoint = pathlib.Path(checkpoint or SHIPPED)
  if not checkpoint.is_dir():
    raise ValueError(f"checkpoint {checkpoint}: no such folder")
  config = weights.read_config(checkpoint)
  if not isinstance(mesh, jax.sharding.Mesh):
    mesh = sharding.generation_mesh(mesh, config.llm)
  tokenizer = load_tokenizer(checkpoint, config.llm.vocab_size)
  with jax.set_mesh(mesh):
    model, params = load_model(checkpoint, mesh, dtype, on_progress or (lambda *_: None), attention)
  return Generator(checkpoint, read_defaults(checkpoint), tokenizer, mesh, model, params)


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


def _read(image):
  return image if hasattr(image, "shape") else read_image(pathlib.Path(image))
