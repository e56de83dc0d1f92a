"""The jitted steps that generation is made of, each a pure function of a Context.

    append_text    append a text                   think    write a text
    append_image   append an image                 denoise  noise -> latents
    decode_pixels latents -> 8-bit image         encode_pixels  8-bit image -> latents

Steps that return a Context consume the one that they are given (its memory is reused): go
on with what they return. Where `model` is asked for, a `UnifiedTransformer`, and `params`
are its parameters.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from irg_jax import flow
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.generate.context import (
    FULL, NO_IMAGE, NO_TEXT, Context, cached, claim, new_kv, seen_before, write)
from irg_jax.generate.sampling import next_token
from irg_jax.generate.settings import Guidance, Sampling
from irg_jax.images import position_ids
from irg_jax import tokens as tokens_lib
from irg_jax.model.attention import KeyValues
from irg_jax.tokens import CAUSAL, NOISE, PADDING, Tokens
from irg_jax.model.decoder import unstack, unstack_layers
from irg_jax.model.vae import Vae, patchify_latents, sample_latents, to_uint8, unpatchify_latents
from irg_jax.sharding import constrain

VIEW_NAMES = {FULL: "full", NO_TEXT: "no_text", NO_IMAGE: "no_image"}


@functools.partial(jax.jit, static_argnames=("model", "views"), donate_argnames=("ctx",))
def append_text(model, params, ctx: Context, ids, count, views) -> Context:
  """Appends one text split to each row.

  Args:
    ids: int32 [B, T], `<|im_start|> ... <|im_end|>`, padded at the end to a rung.
    count: int32 [B], tokens of each row without the padding; 0 leaves a row as it is.
    views: static tuple; the text is read in the first view's context, and becomes visible
      to all of them. They must be the same so far.
  """
  step = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  tokens = Tokens(sample=jnp.where(step < count[:, None], 0, PADDING), index=step,
                  split=jnp.zeros_like(step), kind=jnp.full_like(step, CAUSAL))
  position = ctx.position[:, views[0], None] + step
  und = model.apply({"params": params}, ids, method="embed_text")
  _, kv = _decode(model, params, {"und": und}, tokens, position, cached(ctx, views[:1]))
  return claim(write(ctx, kv), count, views, advance=count)


@functools.partial(
    jax.jit, static_argnames=("model", "views", "latent_grid", "vit_grid", "special"),
    donate_argnames=("ctx",))
def append_image(model, params, ctx: Context, latents, patches, *, latent_grid, vit_grid,
                 special: SpecialTokens, views=(FULL,)) -> Context:
  """Appends one image to each row: clean VAE split, then ViT split; either may be None.

  Args:
    latents: [B, P, latent_dim] clean latent tokens, or None.
    patches: [B, Q, patch * patch * 3] pixels in [-1, 1], or None.
    latent_grid, vit_grid: (rows, columns) of the tokens, static.
    views: as in `append_text`.
  """
  apply = functools.partial(model.apply, {"params": params})
  B = ctx.length.shape[0]
  ends = _image_ends(apply, special, B)
  und, gen, und_tokens, gen_tokens = [], [], [], []  # tokens: (index, split), index in order
  start = split = 0
  if latents is not None:
    n = latents.shape[1]
    place = position_ids(*latent_grid, model.config.max_latent_size)
    gen = [apply(latents, jnp.zeros(()), place, method="embed_latents")]
    gen_tokens = [(start + 1 + jnp.arange(n), split)]
    und, und_tokens = [ends], [(start + jnp.array([0, n + 1]), split)]
    start, split = n + 2, split + 1
  if patches is not None:
    n = patches.shape[1]
    place = jnp.broadcast_to(position_ids(*vit_grid, model.config.vit.grid_size), (B, n))
    vit = apply(patches, place, jnp.zeros_like(place), method="embed_vit")
    und = und + [ends[:, :1], vit, ends[:, 1:]]
    und_tokens = und_tokens + [(start + jnp.arange(n + 2), split)]
    split += 1

  index = jnp.concatenate([i for i, _ in und_tokens + gen_tokens])
  splits = jnp.concatenate([jnp.full(i.shape, s) for i, s in und_tokens + gen_tokens])
  rows = lambda x: jnp.broadcast_to(x, (B, len(index)))
  tokens = Tokens(sample=rows(jnp.zeros_like(index)), index=rows(index), split=rows(splits),
                  kind=rows(jnp.full_like(index, tokens_lib.FULL)))
  position = ctx.position[:, views[0], None] + rows(splits)
  buffers = {"und": jnp.concatenate(und, 1)} | ({"gen": gen[0]} if gen else {})
  _, kv = _decode(model, params, buffers, tokens, position, cached(ctx, views[:1]))
  return claim(write(ctx, kv), jnp.full((B,), len(index)), views, advance=split)


@functools.partial(
    jax.jit, static_argnames=("model", "limit", "sampling", "special", "on_progress"))
def think(model, params, ctx: Context, keys, *, limit: int, sampling: Sampling,
          special: SpecialTokens, on_progress=None, round_number=0):
  """Writes a text in the FULL view, each row until `<|im_end|>` or the limit.

  The context stays as it is: what is decoded is kept beside it meanwhile, to be read back as
  a text of its own (spec section 7: it is re-tokenised).

  Args:
    keys: PRNG keys [B].
    limit: static, tokens of a text with its start token.
    on_progress: static, None or a function (kind, round, step, total) called on the host.

  Returns:
    (ids int32 [B, limit - 1], count int32 [B], ended bool [B]): `count` tokens of each row are
    text; `ended` is false where the limit cut it.
  """
  B, total = ctx.length.shape[0], limit - 1
  params, before = unstack_layers(params), cached(ctx, (FULL,))
  before = dataclasses.replace(before, k=unstack(before.k), v=unstack(before.v))
  written = jax.tree.map(unstack, new_kv(model.config, B, total))

  def step(state):
    i, token, ended, ids, count, written = state
    buffers = {"und": model.apply({"params": params}, token[:, None], method="embed_text")}
    zero = jnp.zeros((B, 1), jnp.int32)
    tokens = Tokens(sample=zero, index=zero, split=zero, kind=zero + CAUSAL)
    position = ctx.position[:, FULL, None] + i
    so_far = jnp.broadcast_to(jnp.arange(total) < i, (B, total))
    caches = before, KeyValues(*written, seen_before(so_far))
    buffers, kv = _decode(model, params, buffers, tokens, position, *caches)
    put = lambda cache, new: lax.dynamic_update_slice_in_dim(cache, new, i, axis=-2)
    written = jax.tree.map(put, written, kv)
    logits = model.apply({"params": params}, buffers["und"][:, 0], method="text_logits")
    token = next_token(logits, jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), sampling)
    ended |= token == special.text_end
    ids = lax.dynamic_update_slice_in_dim(ids, jnp.where(ended, 0, token)[:, None], i, axis=1)
    _report(on_progress, "think", round_number, i + 1, total)
    return i + 1, token, ended, ids, count + ~ended, written

  state = (jnp.int32(0), jnp.full((B,), special.text_start, jnp.int32), jnp.zeros((B,), bool),
           jnp.zeros((B, total), jnp.int32), jnp.zeros((B,), jnp.int32), written)
  if total:
    state = lax.while_loop(lambda s: (s[0] < total) & ~jnp.all(s[2]), step, state)
  _, _, ended, ids, count, _ = state
  return ids, count, ended


@functools.partial(jax.jit, static_argnames=("model", "grid", "special", "views", "on_progress"))
def denoise(model, params, ctx: Context, noise, times, guidance: Guidance | None, *, grid,
         special: SpecialTokens, views, on_progress=None, round_number=0):
  """Denoises one image for each row: Euler steps along the flow.

  Args:
    noise: float32 [B, P, latent_dim].
    times: float32 [N], see `flow.schedule`.
    guidance: scales, interval and renorm; what `views` does not name is not used. None where
      there is only one view, so that all rounds without guidance are one program.
    grid: static (rows, columns) of latent tokens, rows * columns = P.
    views: static, the contexts that guidance combines, FULL first (see `guidance_views`).
    on_progress: as in `think`.

  Returns:
    float32 [B, P, latent_dim], clean latent tokens.
  """
  params = unstack_layers(params)

  def guided(x, t):
    velocities = _velocities(model, params, ctx, x, t, grid, special, views)
    return flow.guide(velocities, guidance.text_scale, guidance.image_scale, guidance.renorm,
                      guidance.renorm_min)

  def plain(x, t):
    return _velocities(model, params, ctx, x, t, grid, special, (FULL,))["full"]

  def step(x, inputs):
    i, t, t_next = inputs
    if len(views) > 1:
      low, high = guidance.interval
      v = lax.cond((low < t) & (t <= high), guided, plain, x, t)
    else:
      v = plain(x, t)
    _report(on_progress, "draw", round_number, i + 1, len(times) - 1)
    return x - v * (t - t_next), None

  inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:])
  return lax.scan(step, noise.astype(jnp.float32), inputs)[0]


def guidance_views(guidance: Guidance) -> tuple[int, ...]:
  """The views that `denoise` needs for a guidance: without text guidance there is none at all."""
  if guidance.text_scale <= 1:
    return (FULL,)
  return (FULL, NO_TEXT, NO_IMAGE) if guidance.image_scale > 1 else (FULL, NO_TEXT)


@functools.partial(jax.jit, static_argnames=("model", "grid", "special", "views"))
def velocities(model, params, ctx: Context, x, t, *, grid, special: SpecialTokens, views):
  """The velocity at x [B, P, latent_dim] and time t under each view, by view name."""
  return _velocities(model, params, ctx, x, t, grid, special, views)


def _velocities(model, params, ctx, x, t, grid, special, views):
  """All views run as one batch against one cache: R = B * views query rows."""
  apply = functools.partial(model.apply, {"params": params})
  B, P, _ = x.shape
  rows = lambda a: jnp.repeat(a, len(views), axis=0)
  gen = rows(apply(x, t, position_ids(*grid, model.config.max_latent_size), method="embed_latents"))
  und = _image_ends(apply, special, B * len(views))
  index = jnp.concatenate([jnp.array([0, P + 1]), 1 + jnp.arange(P)])
  index = jnp.broadcast_to(index, (B * len(views), P + 2))
  zero = jnp.zeros_like(index)
  tokens = Tokens(sample=zero, index=index, split=zero, kind=zero + NOISE)
  position = zero + ctx.position[:, list(views)].reshape(-1, 1)
  buffers, _ = _decode(model, params, {"und": und, "gen": gen}, tokens, position,
                       cached(ctx, views))
  v = apply(buffers["gen"], method="velocity").reshape(B, len(views), P, -1)
  return {VIEW_NAMES[view]: v[:, i] for i, view in enumerate(views)}


@functools.partial(jax.jit, static_argnames=("config", "grid"))
def decode_pixels(config: ModelConfig, params, latents, grid):
  """Latent tokens [B, P, latent_dim] -> 8-bit images, uint8 [B, height, width, 3].

  Args:
    params: the VAE's parameters.
    grid: static (rows, columns) of latent tokens.
  """
  z = unpatchify_latents(latents, *(g * config.latent_patch_size for g in grid),
                         config.latent_patch_size)
  return to_uint8(Vae(config.vae, config.dtype).apply({"params": params}, z, method="decode"))


@functools.partial(jax.jit, static_argnames=("config",))
def encode_pixels(config: ModelConfig, params, pixels, noise=None):
  """Pictures [B, H, W, 3] in [-1, 1] -> clean latent tokens float32 [B, P, latent_dim].

  Args:
    params: the VAE's parameters.
    noise: float32 [B, h, w, z_channels], draw from the posterior; None takes its mean.
  """
  pixels = constrain(pixels, "batch", None, None, None)
  moments = Vae(config.vae, config.dtype).apply({"params": params}, pixels, method="encode")
  return patchify_latents(sample_latents(config.vae, *moments, noise), config.latent_patch_size)


def _decode(model, params, buffers, tokens, position, *caches):
  return model.apply({"params": params}, buffers, tokens, position, caches, method="decode")


def _image_ends(apply, special, rows):
  """Embeddings of <start of image> and <end of image>, [rows, 2, D]."""
  ids = jnp.array([special.image_start, special.image_end])
  ends = apply(ids, method="embed_text")
  return jnp.broadcast_to(ends, (rows, *ends.shape))


def _report(on_progress, kind, round_number, step, total):
  """Calls the host without waiting for it."""
  if on_progress is not None:
    call = lambda r, i: on_progress(kind, int(r), int(i), total)
    jax.debug.callback(call, round_number, step)
