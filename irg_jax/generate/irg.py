"""Interleaved generation, from a batch of prompts to thoughts and images.

One prompt's way, top to bottom:

    begin      system prompt, [image to edit], prompt        -> context
    then every round:
    think      a thought is written, then read as a text       -> context
    draw       noise is denoised under the guidance views      -> latents -> 8-bit image
    look       the 8-bit image is read back, VAE then ViT    -> context

The rows of a batch go through the same phases side by side, each with its own lengths, its
own seed and its own end of thought. What a row gives does not depend on its neighbours.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax import config as config_lib
from irg_jax import flow
from irg_jax.generate import steps
from irg_jax.generate.context import FULL, NO_IMAGE, NO_TEXT, VIEWS, fork, new_context, rung
from irg_jax.generate.settings import Settings
from irg_jax.generate.slots import plan_cache
from irg_jax.images import patchify, to_pixels
from irg_jax.model.unified import UnifiedTransformer


@dataclasses.dataclass(frozen=True)
class Thought:
  """A text that the model wrote.

  Attributes:
    text: as decoded.
    ids: as tokenised again and read back into the context.
    hit_limit: it did not end by itself.
    cut: tokens dropped because, tokenised again, it was longer than the limit.
  """

  text: str = ""
  ids: tuple[int, ...] = ()
  hit_limit: bool = False
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Round:
  """What one round made of one prompt.

  Attributes:
    thought: empty without thinking.
    latents: float32 [P, latent_dim], the clean latent tokens that flow ended in.
    image: uint8 [height, width, 3], decoded from them.
    seconds: wall time of the whole batch by phase: think, draw, decode, encode.
  """

  thought: Thought
  latents: np.ndarray
  image: np.ndarray
  seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Trajectory:
  prompt: str
  rounds: list[Round]


@dataclasses.dataclass(frozen=True)
class Run:
  """A batch of B rows and everything that stays the same while it runs.

  Attributes:
    system_ids, prompt_ids: token ids without `<|im_start|>` and `<|im_end|>`.
    images: None, or uint8 [B, H, W, 3] that the prompts are about.
    draws: function (kind, round, shape) -> float32, kind "noise" or "posterior".
  """

  model: UnifiedTransformer
  params: dict
  tokenizer: object
  settings: Settings
  seeds: list[int]
  system_ids: list[int]
  prompt_ids: list[list[int]]
  images: np.ndarray | None
  draws: Callable
  on_progress: Callable | None


def generate(model: UnifiedTransformer, params, tokenizer, prompts, *, seeds,
             settings: Settings = Settings(), system_prompt="", images=None, draws=None,
             on_progress=None) -> list[Trajectory]:
  """Thinks and draws, `settings.rounds` times, for every prompt (spec section 7).

  Plain text-to-image is `Settings(rounds=1, think=False)`; with thinking, `rounds=1`;
  editing is `images`.

  Args:
    params: {"transformer": ..., "vae": ...}.
    tokenizer: `tokenizer.Tokenizer` (`encode`, `decode`, `special`).
    prompts: B strings.
    seeds: B integers. What a row gives depends on its seed alone.
    system_prompt: read before every prompt; may be empty.
    images: None, or B images to edit, uint8 [H, W, 3] of one size; the prompts are then
      instructions, and `settings.later` guides every round.
    draws: see `Run`; replaces the draws that are made from the seeds.
    on_progress: function (kind, round, step, total) called on the host as work goes on; give
      the same function every time, since compiled code holds on to it.

  Raises:
    ValueError: settings, prompts or images that cannot work; before anything is computed.
  """
  settings.validate(model.config)
  run = _prepare(model, params, tokenizer, prompts, seeds, settings, system_prompt, images,
                 draws, on_progress)
  size, window = _plan(run)
  ctx, history, results = _begin(run, size), [], []
  for number in range(settings.rounds):
    clock = _Clock()
    thoughts = [Thought()] * len(prompts)
    if settings.think:
      ctx = fork(ctx, FULL, NO_TEXT) if number else ctx
      thoughts = _think(run, ctx, number)
      ctx = _read_thoughts(run, ctx, thoughts, apart=bool(history))
    clock.lap("think", ctx)
    latents = clock.lap("draw", _draw(run, ctx, number))
    _announce(run, "decode", number)
    drawn = np.asarray(steps.decode_pixels(model.config, params["vae"], latents, _grid(run)))
    clock.lap("decode", drawn)
    if number + 1 < settings.rounds:
      _announce(run, "encode", number)
      history = [*history, (thoughts, _encode(run, drawn, number))][-window:]
      looked = number + 1 <= window
      ctx = _look(run, ctx, history[-1][1]) if looked else _replay(run, size, history)
      clock.lap("encode", ctx)
    results.append([Round(*row, clock.seconds)
                    for row in zip(thoughts, np.asarray(latents), drawn)])
  return [Trajectory(p, list(rounds)) for p, rounds in zip(prompts, zip(*results))]


def answer(model: UnifiedTransformer, params, tokenizer, prompts, *, seeds,
           settings: Settings = Settings(), system_prompt="", images=None,
           on_progress=None) -> list[Thought]:
  """Text out: chat, or with `images` a question about each image (ViT alone).

  Arguments as in `generate`; `settings.think_limit` limits the answer.

  Raises:
    ValueError: as `generate`.
  """
  config_lib.check(settings)
  run = _prepare(model, params, tokenizer, prompts, seeds, settings, system_prompt, images,
                 None, on_progress)
  size, _ = _plan(run, understand=True)
  ctx = _begin(run, size, understand=True)
  return _think(run, ctx, 0)


def _prepare(model, params, tokenizer, prompts, seeds, settings, system_prompt, images, draws,
             on_progress):
  if len(seeds) != len(prompts) or not prompts:
    raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed a prompt")
  if not all(0 <= seed < 2**32 for seed in seeds):
    raise ValueError(f"seeds must be from 0 to 2**32 - 1: {list(seeds)}")
  if images is not None:
    if len(images) != len(prompts):
      raise ValueError(f"{len(prompts)} prompts but {len(images)} pictures")
    sizes = {p.shape for p in images}
    if any(p.dtype != np.uint8 or p.ndim != 3 or p.shape[-1] != 3 for p in images):
      raise ValueError(f"pictures must be uint8 [height, width, 3], but have shapes {sizes} and "
                       f"dtypes {sorted({p.dtype.name for p in images})}")
    if len(sizes) > 1:
      raise ValueError(f"the images of a batch must have one size, but these have {sizes}")
    images = np.stack([settings.vae_transform(p) for p in images])
  prompt_ids = [tokenizer.encode(p) for p in prompts]
  for number, ids in enumerate(prompt_ids):
    if len(ids) > settings.max_prompt_tokens:
      raise ValueError(
          f"prompt {number} has {len(ids)} tokens, but the cache is made for "
          f"{settings.max_prompt_tokens}: shorten it or raise max_prompt_tokens")
  return Run(model, params, tokenizer, settings, list(seeds), tokenizer.encode(system_prompt),
             prompt_ids, images, draws or seeded_draws(seeds), on_progress)


def _plan(run, understand=False):
  image = None if run.images is None else run.images.shape[1:3]
  return plan_cache(run.model.config, run.settings, len(run.system_ids), image, understand)


def seeded_draws(seeds) -> Callable:
  """Standard normal draws, row by row from that row's seed: see `Run.draws`."""
  def draws(kind, number, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(_keys(seeds, number, kind))

  return draws


def _keys(seeds, number, kind):
  """PRNG keys [B] of one round and one purpose."""
  purpose = ("think", "noise", "posterior").index(kind)
  fold = jax.random.fold_in
  return jax.vmap(lambda seed: fold(fold(jax.random.key(seed), number), purpose))(
      jnp.asarray(seeds, jnp.uint32))


def _begin(run, size, understand=False):
  """A context that has read the system prompt, the images if any, and the prompts."""
  B = len(run.prompt_ids)
  _announce(run, "prompt", 0)
  ctx = new_context(run.model.config, B, size)
  if run.system_ids:
    ctx = _read(run, ctx, [run.system_ids] * B, VIEWS)
  if run.images is None:
    return _read(run, ctx, run.prompt_ids, (FULL, NO_IMAGE))
  ctx = _look(run, ctx, _encode(run, run.images, 0, vae=not understand))
  ctx = fork(ctx, FULL, NO_TEXT)
  ctx = _read(run, ctx, run.prompt_ids, (FULL,))
  return ctx if understand else _read(run, ctx, run.prompt_ids, (NO_IMAGE,))


def _replay(run, size, history):
  """The context as if the conversation had only the rounds of `history`."""
  ctx = _begin(run, size)
  for number, (thoughts, image) in enumerate(history):
    ctx = _read_thoughts(run, ctx, thoughts, apart=number > 0)
    ctx = _look(run, ctx, image)
  return ctx


def _read(run, ctx, texts, views):
  """Appends a text to each row; texts are padded to a rung of the ladder."""
  special = run.tokenizer.special
  rows = [[special.text_start, *ids, special.text_end] for ids in texts]
  padded = np.zeros((len(rows), rung(max(map(len, rows)))), np.int32)
  for row, ids in zip(padded, rows):
    row[:len(ids)] = ids
  count = np.array([len(ids) for ids in rows], np.int32)
  return steps.append_text(run.model, run.params["transformer"], ctx, padded, count, views)


def _think(run, ctx, number):
  s, tokenizer = run.settings, run.tokenizer
  _announce(run, "think", number, s.think_limit - 1)
  ids, count, ended = steps.think(
      run.model, run.params["transformer"], ctx, _keys(run.seeds, number, "think"),
      limit=s.think_limit, sampling=s.sampling, special=tokenizer.special,
      on_progress=run.on_progress, round_number=number)
  thoughts = []
  for row, n, done in zip(*map(np.asarray, (ids, count, ended))):
    text = tokenizer.decode(row[:n].tolist())
    again = tokenizer.encode(text)
    kept = again[:s.think_limit - 1]
    thoughts.append(Thought(text, tuple(kept), not done, len(again) - len(kept)))
  return thoughts


def _read_thoughts(run, ctx, thoughts, apart):
  """Appends thoughts; `apart` once the view without images has parted from the full one."""
  texts = [t.ids for t in thoughts]
  if not apart and run.images is None:
    return _read(run, ctx, texts, (FULL, NO_IMAGE))
  ctx = _read(run, ctx, texts, (FULL,))
  guided = NO_IMAGE in steps.guidance_views(run.settings.later)
  return _read(run, ctx, texts, (NO_IMAGE,)) if guided else ctx


def _draw(run, ctx, number):
  s = run.settings
  first = number == 0 and run.images is None
  guidance, grid = s.first if first else s.later, _grid(run)
  views = steps.guidance_views(guidance)
  _announce(run, "draw", number, s.steps - 1)
  shape = (len(run.seeds), grid[0] * grid[1], run.model.config.latent_dim)
  return steps.denoise(
      run.model, run.params["transformer"], ctx, run.draws("noise", number, shape),
      flow.schedule(s.steps, s.timestep_shift), guidance if len(views) > 1 else None, grid=grid,
      special=run.tokenizer.special, views=views,
      on_progress=run.on_progress, round_number=number)


def _encode(run, images, number, vae=True):
  """8-bit images [B, H, W, 3] -> keyword arguments of `steps.append_image`."""
  config, s = run.model.config, run.settings
  resized = np.stack([s.vae_transform(p) for p in images])
  B, height, width, _ = resized.shape
  seen = [to_pixels(s.vit_transform(p)) for p in resized]
  patches = np.stack([patchify(p, config.vit.patch_size) for p in seen])
  down = config.vae.downsample
  noise_shape = (B, height // down, width // down, config.vae.z_channels)
  latents = steps.encode_pixels(
      config, run.params["vae"], to_pixels(resized),
      run.draws("posterior", number, noise_shape)) if vae else None
  return dict(
      latents=latents, patches=patches,
      latent_grid=(height // config.pixel_stride, width // config.pixel_stride),
      vit_grid=tuple(side // config.vit.patch_size for side in seen[0].shape[:2]))


def _look(run, ctx, encoded):
  return steps.append_image(run.model, run.params["transformer"], ctx,
                            special=run.tokenizer.special, **encoded)


def _grid(run):
  stride = run.model.config.pixel_stride
  return run.settings.height // stride, run.settings.width // stride


def _announce(run, kind, number, total=0):
  """Says that a phase begins; the steps that have any report themselves as they go on."""
  if run.on_progress is not None:
    run.on_progress(kind, number, 0, total)


class _Clock:
  """Wall time by phase."""

  def __init__(self):
    self.seconds, self._last = {}, time.perf_counter()

  def lap(self, name, value):
    """Waits for `value`, books the time since the last lap under `name`, returns `value`."""
    jax.block_until_ready(value)
    now = time.perf_counter()
    self.seconds[name], self._last = now - self._last, now
    return value
