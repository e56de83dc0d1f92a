"""Interleaved generation, from a batch of prompts to thoughts and images (docs/spec.md, section 7).

`generate` is the story, made of phases that can be called one by one:

    begin      system prompt, [input images], prompt         -> context
    then each round:
    think      write a thought; `read_thoughts` appends it   -> context
    denoise    noise -> latent tokens; `steps.decode_pixels` -> 8-bit image
    look       append the 8-bit image, as VAE then ViT split -> context

The rows of a batch run side by side, each with its own lengths, seed and end of thought. A row's
result does not depend on its neighbours.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from irg_jax import sharding
from irg_jax.generate import steps, stopping
from irg_jax.generate.context import (
    FULL, NO_IMAGE, NO_TEXT, VIEWS, Context, fork, guidance_views, in_layers, new_context,
    plan_cache, rung, view_mask)
from irg_jax.generate.denoise import denoise, passes
from irg_jax.generate.settings import Settings
from irg_jax.images import patchify, to_pixels
from irg_jax.model.unified import UnifiedTransformer

_REPORTS = 25  # of a phase to a listener; a run without one is not interrupted
_TOKENS = 8  # between two calls of `Job.on_text`


@dataclasses.dataclass(frozen=True)
class Thought:
  """A text that the model wrote."""

  text: str = ""
  ids: tuple[int, ...] = ()  # the text tokenised again, as appended to the context
  hit_limit: bool = False  # it did not end by itself
  cut: int = 0  # tokens dropped because the text, tokenised again, exceeded the limit
  # The ids are the tokens that were sampled, not others that spell the same.
  as_sampled: bool = dataclasses.field(default=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Round:
  """The result of one round of one prompt. A round that has only its thought yet has no image."""

  thought: Thought  # empty without thinking
  # float32 [P, latent_dim], clean; None in a round that was read from a trace
  latents: np.ndarray | None = dataclasses.field(repr=False)
  image: np.ndarray | None = dataclasses.field(repr=False)  # uint8 [height, width, 3]
  seconds: dict[str, float]  # of the whole batch by phase: think, draw (denoise), decode, encode
  passes: int = 0  # times that the decoder ran for the image, see `denoise.passes`
  kept: bool = False  # the thought found nothing to improve: the image is that of the round before


@dataclasses.dataclass(frozen=True)
class Trajectory:
  prompt: str
  rounds: list[Round]


@dataclasses.dataclass(frozen=True)
class Room:
  """Sizes of compiled programs, for runs whose settings differ to share them; 0: as needed."""

  thought: int = 0  # tokens of a thought, at least think_limit - 1
  times: int = 0  # points of the flow schedule, at least `Settings.steps`


@dataclasses.dataclass(frozen=True)
class Job:
  """A batch of B rows with everything that stays constant while it runs; made by `prepare`."""

  model: UnifiedTransformer
  params: dict
  tokenizer: object
  settings: Settings
  seeds: list[int]
  system_ids: list[int]  # without `<|im_start|>` and `<|im_end|>`, as `prompt_ids`
  prompt_ids: list[list[int]]
  images: tuple[np.ndarray, ...] = ()  # input images in their order, uint8 [B, Y, X, 3] each
  # (kind, round, shape) -> standard normal float32 of that shape, with kind "noise" (of `denoise`),
  # "posterior" (of the VAE) or "input" (of the VAE, for input images after the first, numbered)
  noise: Callable | None = None
  on_progress: Callable | None = None  # (kind, round, step, total), called on the host
  on_text: Callable | None = None  # (round, texts of the rows so far), every few tokens
  room: Room = Room()
  draw: Callable | None = None  # in place of `denoise.denoise`, with its arguments and result

  @property
  def cache(self) -> tuple[int, int]:
    """(slots of a row, earlier rounds that fit), see `context.plan_cache`."""
    return plan_cache(self.model.config, self.settings, len(self.system_ids),
                      [image.shape[1:3] for image in self.images])

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of the latent tokens of an image."""
    stride = self.model.config.pixel_stride
    return self.settings.height // stride, self.settings.width // stride

  def parts(self, kind: str, number: int, total: int, most: int | None = None):
    """Yields (start, stop) of parts of at most `most` of `total` steps, and reports each.

    A run without a listener is not interrupted but for `most`.
    """
    self.report(kind, number, 0, total)
    size = min(most or total, total if self.on_progress is None else -(-total // _REPORTS))
    for start in range(0, total, size or 1):
      stop = min(start + size, total)
      yield start, stop
      self.report(kind, number, stop, total)

  def report(self, kind: str, number: int, step: int = 0, total: int = 0):
    """Tells the listener, if any, how far a phase is; step 0 announces it."""
    if self.on_progress is not None:
      self.on_progress(kind, number, step, total)


def generate(model: UnifiedTransformer, params, tokenizer, prompts, *, seeds,
             settings: Settings = Settings(), system_prompt="", images=None, noise=None,
             on_progress=None, on_text=None, room=Room(), draw=None, done=(),
             on_result=None, satisfied="") -> list[Trajectory]:
  """Thinks and draws an image, `settings.rounds` times for every prompt.

  Plain text-to-image is `Settings(rounds=1, think=False)`; with thinking, `rounds=1`; editing is
  `images`. With `settings.until_satisfied` each row stops alone, see `stopping`.

  Args:
    params: {"transformer": ..., "vae": ...}.
    tokenizer: `tokenizer.Tokenizer` (`encode`, `decode`, `special`).
    prompts: B strings.
    seeds: B integers from 0 to 2**32 - 1; a row's result depends on its own seed alone.
    system_prompt: read before every prompt; may be empty.
    images: None, or for each prompt an image to edit or a list of images, read in their order:
      uint8 [Y, X, 3], equally many and of equal sizes for all prompts. The prompts are then
      instructions, and `settings.later` guides every round.
    noise: see `Job`; None derives it from the seeds.
    on_progress, on_text, room, draw: see `Job`. Compiled programs do not depend on listeners.
    done: rounds of an earlier run with the same arguments, lists of B `Round`s, which are read, not
      made again. The last one may lack images. A row that stopped repeats its last round.
    on_result: told all rounds so far, such lists, after each thought and each image but the last.
    satisfied: see `settings.Defaults`.

  Raises:
    ValueError: settings, prompts or images that cannot work; before anything is computed.
  """
  settings.validate(model.config)
  stopping.check(settings, satisfied)
  job = prepare(model, params, tokenizer, prompts, seeds=seeds, settings=settings,
                system_prompt=system_prompt, images=images, noise=noise, on_progress=on_progress,
                on_text=on_text, room=room, draw=draw)
  _, window = job.cache
  tell = on_result or (lambda _: None)
  ctx, history, results, kept = begin(job), [], [], [None] * len(prompts)
  for number in range(settings.rounds):
    rows = done[number] if number < len(done) else None
    seconds = dict(max((row.seconds for row in rows), key=len)) if rows else {}
    lap = functools.partial(_lap, time.perf_counter() - sum(seconds.values()), seconds)
    thoughts = [row.thought for row in rows] if rows else [Thought()] * len(prompts)
    if settings.think:
      ctx = fork(ctx, FULL, NO_TEXT) if number else ctx
      thoughts = thoughts if rows else think(job, ctx, number, kept)
      thoughts = [Thought() if last else thought for last, thought in zip(kept, thoughts)]
      ctx = read_thoughts(job, ctx, thoughts, after_image=bool(history))
    lap("think", ctx)
    kept = stopping.kept(settings, satisfied, results and results[-1], thoughts, seconds)
    own = lambda drawn: [last or row for last, row in zip(kept, drawn)]
    if all(kept):
      results.append(kept)
      break
    if settings.think and not rows:
      tell([*results, own([Round(thought, None, None, seconds) for thought in thoughts])])
    if rows and all(row.image is not None for row in rows):
      results.append(own(rows))
    else:
      latents, images = _draw(job, ctx, number, lap)
      count = passes(settings, number, bool(job.images))
      results.append(own([Round(*row, seconds, count) for row in zip(thoughts, latents, images)]))
      if number + 1 < settings.rounds:
        tell(results)
    if number + 1 < settings.rounds:
      job.report("encode", number)
      images = [row.image for row in results[-1]]
      history = [*history, (thoughts, encode(job, images, number))][-window:]
      fits = number + 1 <= window
      ctx = look(job, ctx, history[-1][1]) if fits else _replay(job, history)
      lap("encode", ctx)
  return [Trajectory(p, stopping.own(rounds)) for p, rounds in zip(prompts, zip(*results))]


def prepare(model, params, tokenizer, prompts, *, seeds, settings, system_prompt="", images=None,
            noise=None, on_progress=None, on_text=None, room=Room(), draw=None) -> Job:
  """Checks and encodes the inputs of `generate`; arguments and errors as there."""
  if len(seeds) != len(prompts) or not prompts:
    raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed a prompt")
  if not all(0 <= seed < 2**32 for seed in seeds):
    raise ValueError(f"seeds must be from 0 to 2**32 - 1: {list(seeds)}")
  images = tuple(np.stack([settings.vae_transform(image) for image in column])
                 for column in ([] if images is None else check_images(images, prompts)))
  prompt_ids = [tokenizer.encode(p) for p in prompts]
  for number, ids in enumerate(prompt_ids):
    if len(ids) > settings.max_prompt_tokens:
      raise ValueError(f"prompt {number} has {len(ids)} tokens, but the cache is made for "
                       f"{settings.max_prompt_tokens}: shorten it or raise max_prompt_tokens")
  return Job(model, params, tokenizer, settings, list(seeds), tokenizer.encode(system_prompt),
             prompt_ids, images, noise or steps.seeded_noise(seeds), on_progress, on_text, room,
             draw)


def check_images(images, prompts) -> list:
  """The first images of all prompts, their second ones, ..."""
  rows = [[row] if getattr(row, "ndim", 0) == 3 else list(row) for row in images]
  if len(rows) != len(prompts) or len(set(map(len, rows))) > 1:
    raise ValueError(f"{len(prompts)} prompts but {len(rows)} images or lists of images "
                     f"({sorted(set(map(len, rows)))} long): give each prompt as many")
  for column in zip(*rows):
    sizes = {image.shape for image in column}
    if any(x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3 for x in column):
      raise ValueError(f"images must be uint8 [height, width, 3], but have shapes {sizes} and "
                       f"dtypes {sorted({image.dtype.name for image in column})}")
    if len(sizes) > 1:
      raise ValueError(f"the images of a batch must have one size, but these have {sizes}")
  return list(zip(*rows))


def begin(job: Job) -> Context:
  """A new context with the system prompt, the input images if any, and the prompts."""
  job.report("prompt", 0)
  ctx = open_context(job, job.cache[0])
  if not job.images:
    return append(job, ctx, job.prompt_ids, (FULL, NO_IMAGE))
  for i, images in enumerate(job.images):
    ctx = look(job, ctx, encode(job, images, i, kind="input" if i else "posterior"))
  ctx = append(job, fork(ctx, FULL, NO_TEXT), job.prompt_ids, (FULL,))
  return append(job, ctx, job.prompt_ids, (NO_IMAGE,))


def think(job: Job, ctx: Context, number: int, stopped=()) -> list[Thought]:
  """Writes the thoughts of round `number`, one a row; the context is read, not changed.

  `stopped` may say for each row that it writes nothing.
  """
  s, tokenizer, limit = job.settings, job.tokenizer, job.settings.think_limit - 1
  ctx, keys_B = in_layers(ctx), steps.row_keys(np.array(job.seeds, np.uint32), number, "think")
  draft = steps.new_draft(job.model.config, len(job.seeds), max(limit, job.room.thought),
                          tokenizer.special, np.array(stopped or [None] * len(job.seeds), bool))
  sampled = lambda: [ids_T[:count].tolist() for ids_T, count in zip(
      sharding.to_host(draft.ids), sharding.to_host(draft.count))]
  for _, stop in job.parts("think", number, limit, _TOKENS if job.on_text else limit):
    draft = jax.block_until_ready(steps.think(
        job.model, job.params["transformer"], ctx, draft, keys_B, stop, sampling=s.sampling,
        special=tokenizer.special))
    if job.on_text is not None:
      job.on_text(number, list(map(tokenizer.decode, sampled())))
      if sharding.to_host(draft.ended).all():
        break
  thoughts = []
  for own, ended in zip(sampled(), sharding.to_host(draft.ended)):
    ids = tokenizer.encode(text := tokenizer.decode(own))
    thoughts.append(Thought(text, tuple(ids[:limit]), not ended, max(0, len(ids) - limit),
                            list(ids) == own))
  return thoughts


def read_thoughts(job: Job, ctx: Context, thoughts, after_image: bool) -> Context:
  """Appends thoughts; after an image, a second time for the view without images."""
  texts = [thought.ids for thought in thoughts]
  if not after_image and not job.images:
    return append(job, ctx, texts, (FULL, NO_IMAGE))
  ctx = append(job, ctx, texts, (FULL,))
  guided = NO_IMAGE in guidance_views(job.settings.later)
  return append(job, ctx, texts, (NO_IMAGE,)) if guided else ctx


def _draw(job, ctx, number, lap):
  """Denoises and decodes; returns latents and 8-bit images, in rows."""
  latents = lap("draw", (job.draw or denoise)(job, ctx, number))
  job.report("decode", number)
  images = steps.decode_pixels(job.model.config, job.params["vae"], latents, job.grid)
  return sharding.to_host(latents), lap("decode", sharding.to_host(images))


def encode(job: Job, images, number: int, vae=True, kind="posterior") -> dict:
  """Keyword arguments of `steps.append_image` for 8-bit images [B, Y, X, 3] of round `number`.

  Without `vae`, the ViT split alone is appended. `kind` is that of `Job.noise`.
  """
  config, s = job.model.config, job.settings
  images = np.stack([s.vae_transform(image) for image in images])
  B, *size, _ = images.shape
  seen = [to_pixels(s.vit_transform(image)) for image in images]
  tokens = lambda size, stride: tuple(side // stride for side in size)
  latents_BPC = None
  if vae:
    shape = (B, *tokens(size, config.vae.downsample), config.vae.z_channels)
    latents_BPC = steps.encode_pixels(config, job.params["vae"], to_pixels(images),
                                      job.noise(kind, number, shape))
  patches_BPC = np.stack([patchify(image, config.vit.patch_size) for image in seen])
  return dict(latents_BPC=latents_BPC, patches_BPC=patches_BPC,
              latent_grid=tokens(size, config.pixel_stride),
              vit_grid=tokens(seen[0].shape[:2], config.vit.patch_size))


def look(job: Job, ctx: Context, encoded: dict) -> Context:
  """Appends images from `encode`."""
  return steps.append_image(job.model, job.params["transformer"], ctx,
                            special=job.tokenizer.special, **encoded)


def _replay(job, history):
  """Rebuilds the context from the rounds of `history` alone."""
  ctx = begin(job)
  for number, (thoughts, encoded) in enumerate(history):
    ctx = look(job, read_thoughts(job, ctx, thoughts, after_image=number > 0), encoded)
  return ctx


def open_context(job: Job, slots: int) -> Context:
  """A new context with the system prompt, if any, for all views."""
  ctx, B = new_context(job.model.config, len(job.seeds), slots), len(job.seeds)
  return append(job, ctx, [job.system_ids] * B, VIEWS) if job.system_ids else ctx


def append(job: Job, ctx: Context, texts, views) -> Context:
  """Appends a text, token ids, to each row for `views`, padded to a rung of the ladder."""
  special = job.tokenizer.special
  rows = [[special.text_start, *ids, special.text_end] for ids in texts]
  ids_BT = np.zeros((len(rows), rung(max(map(len, rows)))), np.int32)
  for padded, ids in zip(ids_BT, rows):
    padded[:len(ids)] = ids
  count_B = np.array([len(ids) for ids in rows], np.int32)
  return steps.append_text(job.model, job.params["transformer"], ctx, ids_BT, count_B,
                           view_mask(views))


def _lap(start, seconds, name, value):
  """Waits for `value`, then books the time since the last phase as that of `name`, once."""
  jax.block_until_ready(value)
  if name not in seconds:
    seconds[name] = time.perf_counter() - start - sum(seconds.values())
  return value
