"""`load`: a checkpoint that generates. The command line, the benchmarks and Python all use it."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import numbers
import os
import pathlib

import jax
import numpy as np
from PIL import Image

from irg_jax import config as config_lib
from irg_jax import hub, sharding, storage
from irg_jax import weights as weights_lib
from irg_jax.generate import answer, irg, stopping
from irg_jax.generate.context import plan_cache
from irg_jax.generate.settings import Defaults, Settings, check_prompts, expand, read_defaults
from irg_jax.images import read_image, to_rgb
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.reports import pages, trace
from irg_jax.tokenizer import Tokenizer, load_tokenizer
from irg_jax.weights import peft


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


@dataclasses.dataclass(frozen=True, repr=False)
class Generator:
  """A checkpoint on the devices of a mesh, with its settings; made by `load`."""

  checkpoint: pathlib.Path
  fingerprint: str  # of the checkpoint, see `weights.fingerprint`
  defaults: Defaults  # of the checkpoint
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  model: UnifiedTransformer
  params: dict
  adapters: peft.Source | None = None  # merged into the parameters
  weights: str | None = None  # "int8": quantized as they were read

  def __repr__(self):
    count = sum(x.size for x in jax.tree.leaves(self.params))
    return (f"Generator({str(self.checkpoint)!r}: {count:.3g} parameters, "
            f"{self.model.config.dtype}, {_devices(self.mesh)})")

  @property
  def settings(self) -> Settings:
    """The checkpoint's settings of generation."""
    return self.defaults.settings

  def generate(self, prompts, *, images=(), seed=0, batch_size: int = 1, settings=None,
               system_prompt=None, on_progress=None, **changes):
    """Thinks and draws, as `irg generate` with the same flags does.

    Args:
      prompts: a prompt, or a list of them.
      images: an image to edit or a list of them, for all prompts; see `read_images`.
      seed: prompt number i has the seed `seed + i`.
      batch_size: prompts that run side by side.
      settings: `Settings`; None: the checkpoint's.
      system_prompt: None: the checkpoint's.
      on_progress: see `irg.Job`.
      changes: fields of `Settings` to change, such as `rounds=3, text_scale=2.0, size=(64, 64)`
        (width, height), `rounds="auto"`, or `later={"renorm": "global"}`.

    Returns:
      A `Result`, or a list of them for a list of prompts.

    Raises:
      ValueError: prompts, images or settings that cannot work.
    """
    several = not isinstance(prompts, str)
    prompts = check_prompts(prompts if several else [prompts])
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
      raise ValueError(f"batch_size {batch_size}: must be 1 or more")
    if not isinstance(seed, numbers.Integral) or not 0 <= seed <= 2**32 - len(prompts):
      raise ValueError(f"seed {seed}: must be an integer from 0, and that of the last prompt "
                       f"(seed + {len(prompts) - 1}) below 2**32")
    settings, system_prompt = self._chosen(settings, system_prompt, changes)
    arrays, paths = read_images(images)
    settings.validate(self.model.config)
    self.defaults.check(settings)
    texts = [self.defaults.read(p, settings, bool(arrays)).text for p in prompts]
    check_lengths(self.model.config, self.tokenizer, settings, system_prompt, texts, arrays)
    results = []
    for rows in batches(len(prompts), batch_size):
      drawn = self.batch(
          [prompts[i] for i in rows], [seed + i for i in rows], settings, system_prompt,
          size=min(batch_size, len(prompts)), images=[arrays] * len(rows), on_progress=on_progress)
      results += [
          Result(self.record(t, settings, system_prompt, seed + i, batch_size, arrays, paths))
          for i, t in zip(rows, drawn)]
    return results if several else results[0]

  def edit(self, instruction: str, *images, **options):
    """Draws `images` anew as the instruction says; images and options as of `generate`."""
    return self.generate(instruction, images=images, **options)

  def ask(self, question: str, *images, seed: int = 0, settings=None, system_prompt=None,
          on_text=None, **changes) -> str:
    """Answers in text: chat, or with images (see `read_images`) a question about them.

    Settings that matter are `think_limit`, the longest answer, and those of sampling. `on_text` is
    told the answer so far, see `irg.Job`.
    """
    question, = check_prompts([question])
    settings, system_prompt = self._chosen(settings, system_prompt, changes)
    arrays, _ = read_images(images)
    thought, = self.answers([[*arrays, question]], [seed], settings, system_prompt, size=1,
                           on_text=on_text)
    return thought.text

  def answers(self, conversations, seeds, settings: Settings, system_prompt: str, *, size: int,
              **options) -> list[irg.Thought]:
    """`answer.answer` for at most `size` conversations, padded to `size` as in `batch`."""
    with jax.set_mesh(self.mesh):
      return answer.answer(
          self.model, self.params, self.tokenizer, stopping.filled(conversations, size),
          seeds=stopping.filled(seeds, size),
          settings=settings, system_prompt=system_prompt, **options)[:len(conversations)]

  def batch(self, prompts, seeds, settings: Settings, system_prompt: str, *, size: int,
            images=(), done=(), on_result=None, **options) -> list[irg.Trajectory]:
    """`irg.generate` for at most `size` prompts, padded to `size`, as the model reads them.

    A short batch repeats its last row: another size would compile again, and no row's result
    depends on its neighbours. `images` are lists of arrays, one for each prompt. `on_result` gets
    the trajectories so far.
    """
    named = lambda rounds: [irg.Trajectory(p, stopping.own(row))
                            for p, row in zip(prompts, zip(*rounds))]
    edits = any(map(len, images))
    texts = [self.defaults.read(p, settings, edits).text for p in prompts]
    with jax.set_mesh(self.mesh):
      drawn = irg.generate(
          self.model, self.params, self.tokenizer, stopping.filled(texts, size),
          seeds=stopping.filled(seeds, size),
          settings=settings, system_prompt=system_prompt,
          images=stopping.filled(images, size) if edits else None,
          done=[stopping.filled(rows, size) for rows in done],
          on_result=on_result and (lambda rounds: on_result(named(rounds))),
          satisfied=self.defaults.satisfied, **options)
    return [dataclasses.replace(t, prompt=p) for t, p in zip(drawn, prompts)]

  def record(self, trajectory: irg.Trajectory, settings: Settings, system_prompt: str, seed: int,
             batch_size: int, images=(), paths=()) -> dict:
    """The record of a prompt for `trace.write_trace`; seconds are those of its whole batch."""
    shape = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
    used = dataclasses.asdict(settings) | {
        "batch_size": batch_size, "image": ", ".join(map(str, paths)) or None,
        "dtype": self.model.config.dtype, "mesh": shape or None,
        "devices": _devices(self.mesh)}
    if settings.until_satisfied:
      used |= {"satisfied": self.defaults.satisfied}
    else:  # as it was before there was a choice
      del used["until_satisfied"]
    if self.adapters:
      used |= {"lora": str(self.adapters.folder), "lora_scale": self.adapters.scale}
    if self.weights:
      used |= {"weights": self.weights}
    reading = self.defaults.read(trajectory.prompt, settings, bool(images))
    return {
        "prompt": trajectory.prompt, **reading.record, "system_prompt": system_prompt, "seed": seed,
        "checkpoint": str(self.checkpoint), "fingerprint": self._fingerprint(images),
        "settings": used, "versions": versions(),
        "sources": [settings.vae_transform(image) for image in images],
        "rounds": [round_record(r, settings.think, r.image) for r in trajectory.rounds]}

  def _fingerprint(self, images):
    """Digest of the inputs that a record only names: weights and images."""
    digest = hashlib.sha256(self.fingerprint.encode())
    for image in images:
      digest.update(f"{image.shape}".encode() + image.tobytes())
    return digest.hexdigest()[:16]

  def _chosen(self, settings, system_prompt, changes):
    settings = config_lib.update(settings or self.settings, expand(changes))
    prompt = self.defaults.system_prompt if system_prompt is None else system_prompt
    return settings, prompt.strip()


def load(checkpoint=None, *, mesh=None, dtype: str | None = None, attention: str = "auto",
         lora=None, lora_scale: float = 1.0, weights: str | None = None,
         on_progress=None) -> Generator:
  """Reads a checkpoint onto the devices.

  Each process compiles its programs anew, unless `irg_jax.keep_programs()` was called before.

  Args:
    checkpoint: folder in the published layout or Orbax, or `owner/name[@revision]` on the hub;
      None: the mini world's in the package.
    mesh: a mesh, or sizes by axis name for `sharding.generation_mesh`; None: its default.
    dtype: of parameters and arithmetic; None: the checkpoint's own.
    attention: see `ModelConfig.attention`.
    lora: folder of adapters in PEFT's files, merged into the weights; None: none.
    lora_scale: how much they count; 1: as they were trained.
    weights: "int8": matrices of layers take a byte a number, see `weights.int8`; None: as stored.
    on_progress: told that weights are being read, see `irg.Job`.

  Raises:
    ValueError: names the file that is missing or broken, and the mend.
  """
  checkpoint = hub.local(checkpoint or storage.SHIPPED, weights_lib.needed)
  if not checkpoint.is_dir():
    raise ValueError(f"checkpoint {checkpoint}: no such folder")
  config = weights_lib.read_config(checkpoint)
  if not isinstance(mesh, jax.sharding.Mesh):
    mesh = sharding.generation_mesh(mesh, config.llm)
  tokenizer = load_tokenizer(checkpoint, config.llm.vocab_size)
  adapters = lora and peft.Source(pathlib.Path(lora), lora_scale)
  with jax.set_mesh(mesh):
    model, params = load_model(checkpoint, mesh, dtype, on_progress or (lambda *_: None), attention,
                               adapters, weights)
  return Generator(checkpoint, weights_lib.fingerprint(checkpoint, adapters, weights),
                   read_defaults(checkpoint), tokenizer, mesh, model, params, adapters, weights)


def load_model(checkpoint, mesh, dtype, progress, attention: str = "auto",
               adapters: peft.Source | None = None,
               weights: str | None = None) -> tuple[UnifiedTransformer, dict]:
  """Reads the model and the parameters of a checkpoint onto the devices of `mesh`.

  `dtype` is that of parameters and arithmetic, None for the checkpoint's own, with bfloat16
  arithmetic for weights of 8 bits; `weights` is as of `load`; `progress` is a `progress.Progress`
  or another function of a phase.
  """
  progress("read")
  dtype = dtype or read_defaults(checkpoint).dtype
  config, params = weights_lib.load_checkpoint(
      checkpoint, dtype=dtype, compute_dtype=dtype, adapters=adapters, weights=weights,
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
  return {name: _version(name) for name in ("irg_jax", "jax", "jaxlib", "flax")}


@functools.cache  # it takes a millisecond to read, and each record has them all
def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"  # a source tree on the path


def round_record(drawn: irg.Round, thinks: bool, image) -> dict:
  """The record of a round for `trace.json`; `image` stands for its image there."""
  return {"think": drawn.thought.text if thinks else None, "think_tokens": len(drawn.thought.ids),
          "hit_limit": drawn.thought.hit_limit, "tokens_cut": drawn.thought.cut, "picture": image,
          "passes": drawn.passes, **({"kept": True} if drawn.kept else {}),
          "seconds": drawn.seconds}


def read_images(images) -> tuple[list[np.ndarray], list]:
  """Images to edit or ask about, uint8 [height, width, 3], and the paths of those that are files.

  `images` is one or a list of: a path, an array uint8 [height, width, 3], an image of Pillow.
  ValueError names the file, or the place of an array of another form.
  """
  one = isinstance(images, (str, os.PathLike, Image.Image)) or hasattr(images, "dtype")
  arrays, paths = [], []
  for number, image in enumerate([images] if one else images, 1):
    if isinstance(image, (str, os.PathLike)):
      paths.append(image)
      image = read_image(image)
    image = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise ValueError(f"image {number} is {image.dtype} {list(image.shape)}, but must be uint8 "
                       "[height, width, 3], with levels from 0 to 255")
    arrays.append(image)
  return arrays, paths


def check_lengths(config, tokenizer, settings: Settings, system_prompt: str, prompts,
                  images=()) -> None:
  """Checks that prompts and images fit the cache; ValueError names the prompt or the setting."""
  limit = settings.max_prompt_tokens
  for number, prompt in enumerate(prompts, 1):
    count = _count(tokenizer, prompt, f"prompt {number}")
    if count > limit:
      raise ValueError(f"prompt {number} has {count} tokens, more than the {limit} that the cache "
                       f"is made for: shorten it, or set max_prompt_tokens={count} (on the "
                       f"command line --config.max_prompt_tokens={count})")
  sizes = [settings.vae_transform.size(*image.shape[1::-1])[::-1] for image in images]
  plan_cache(config, settings, _count(tokenizer, system_prompt, "system prompt"), sizes)


def _devices(mesh):
  return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def _count(tokenizer, text, name):
  try:
    return len(tokenizer.encode(text))
  except ValueError as e:
    raise ValueError(f"{name}: {e}") from e
