"""The compiled steps of generation, pure functions of a Context and arrays.

    append_text    text -> context             think          context -> text, token by token
    append_image   image -> context            denoise        context, noise -> latents
    encode_pixels  8-bit image -> latents      decode_pixels  latents -> 8-bit image

Steps that return a Context or a Draft donate the one that they are given: use only the result.
`think` and `denoise` run up to a given step, so a caller may run them in parts and report
progress in between; the compiled program is the same. `model` is a `UnifiedTransformer`, `params`
its parameters. Letters of axes as in `tokens`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import lax

from irg_jax import flow
from irg_jax import tokens as tokens_lib
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.generate.context import (
    FULL, NO_IMAGE, NO_TEXT, Context, cached, claim, new_kv, seen_before, view_mask, write)
from irg_jax.generate.forecast import extrapolate, learn
from irg_jax.generate.settings import Guidance, Sampling
from irg_jax.images import position_ids
from irg_jax.model.attention import KeyValues
from irg_jax.model.kernels import cpu
from irg_jax.model.vae import Vae, patchify_latents, sample_latents, to_uint8, unpatchify_latents
from irg_jax.sharding import constrain
from irg_jax.tokens import CAUSAL, NOISE, PADDING, Tokens

VIEW_NAMES = {FULL: "full", NO_TEXT: "no_text", NO_IMAGE: "no_image"}


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("ctx",))
def append_text(model, params, ctx: Context, ids_BT, count_B, sees_W) -> Context:
  """Appends one text split to each row.

  Args:
    ids_BT: int32, `<|im_start|> ... <|im_end|>`, padded at the end to a rung of the ladder.
    count_B: int32, tokens of each row without padding; 0 leaves a row unchanged.
    sees_W: bool, the views that see the text. Their contexts must be equal so far: the text
      attends through the first one.
  """
  first = jnp.argmax(sees_W)
  step_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
  tokens = Tokens(sample=jnp.where(step_BT < count_B[:, None], 0, PADDING), index=step_BT,
                  split=jnp.zeros_like(step_BT), kind=jnp.full_like(step_BT, CAUSAL))
  position_BT = ctx.position[:, first, None] + step_BT
  und_BUD = model.apply({"params": params}, ids_BT, method="embed_text")
  _, kv = _decode(model, params, {"und": und_BUD}, tokens, position_BT, cached(ctx, [first]))
  return claim(write(ctx, kv), count_B, sees_W, advance=count_B)


@functools.partial(
    jax.jit, static_argnames=("model", "latent_grid", "vit_grid", "special"),
    donate_argnames=("ctx",))
def append_image(model, params, ctx: Context, latents_BPC, patches_BPC, *, latent_grid, vit_grid,
                 special: SpecialTokens) -> Context:
  """Appends one image to each row, for the FULL view: a VAE split, then a ViT split.

  Either split may be None.

  Args:
    latents_BPC: [B, P, latent_dim] clean latent tokens, or None.
    patches_BPC: [B, P, patch * patch * 3] pixels in [-1, 1], or None.
    latent_grid, vit_grid: static (rows, columns) of the tokens of each split.
  """
  apply = functools.partial(model.apply, {"params": params})
  B = len(ctx.length)
  ends_B2D = _image_ends(apply, special, B)
  parts = {"und": [], "gen": []}  # (embeddings, index within the image, split) of tokens
  start = split = 0
  if latents_BPC is not None:
    P = latents_BPC.shape[1]
    cell_P = position_ids(*latent_grid, model.config.max_latent_size)
    gen_BPD = apply(latents_BPC, jnp.zeros(()), cell_P, method="embed_latents")
    parts["und"].append((ends_B2D, jnp.array([0, P + 1]), split))
    parts["gen"].append((gen_BPD, 1 + jnp.arange(P), split))
    start, split = P + 2, split + 1
  if patches_BPC is not None:
    P = patches_BPC.shape[1]
    cell_BP = jnp.broadcast_to(position_ids(*vit_grid, model.config.vit.grid_size), (B, P))
    vit_BPD = apply(patches_BPC, cell_BP, jnp.zeros_like(cell_BP), method="embed_vit")
    und_BTD = jnp.concatenate([ends_B2D[:, :1], vit_BPD, ends_B2D[:, 1:]], 1)
    parts["und"].append((und_BTD, start + jnp.arange(P + 2), split))
    split += 1

  places = parts["und"] + parts["gen"]
  rows = lambda x_T: jnp.broadcast_to(x_T, (B, len(x_T)))
  index_BT = rows(jnp.concatenate([index_T for _, index_T, _ in places]))
  split_BT = rows(jnp.concatenate([jnp.full(len(index_T), n) for _, index_T, n in places]))
  tokens = Tokens(sample=jnp.zeros_like(index_BT), index=index_BT, split=split_BT,
                  kind=jnp.full_like(index_BT, tokens_lib.FULL))
  position_BT = ctx.position[:, FULL, None] + split_BT
  buffers = {name: jnp.concatenate([x_BTD for x_BTD, _, _ in part], 1)
             for name, part in parts.items() if part}
  _, kv = _decode(model, params, buffers, tokens, position_BT, cached(ctx, [FULL]))
  return claim(write(ctx, kv), jnp.full((B,), index_BT.shape[1]), view_mask([FULL]), advance=split)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
  """A text of at most T tokens that is being written, beside the Context."""

  step: jax.Array  # int32 scalar, tokens decoded so far
  token: jax.Array  # int32 [B], the last one
  ids: jax.Array  # int32 [B, T], 0 from the end of the text on
  count: jax.Array  # int32 [B], tokens of text
  ended: jax.Array  # bool [B], whether the row has produced `<|im_end|>`
  kv: tuple[list, list]  # of the decoded tokens, `cpu.layers` of [L, B, K, T, H] each


@functools.partial(jax.jit, static_argnames=("config", "batch", "size", "special"))
def new_draft(config, batch: int, size: int, special: SpecialTokens, ended_B=False) -> Draft:
  """An empty draft with room for `size` tokens a row; rows in `ended_B` stay empty."""
  zeros_B = jnp.zeros((batch,), jnp.int32)
  return Draft(step=jnp.int32(0), token=zeros_B + special.text_start, count=zeros_B,
               ids=jnp.zeros((batch, size), jnp.int32), ended=(zeros_B > 0) | ended_B,
               kv=tuple(map(cpu.layers, new_kv(config, batch, size))))


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames=("draft",))
def think(model, params, ctx: Context, draft: Draft, keys_B, stop, *, sampling: Sampling,
          special: SpecialTokens) -> Draft:
  """Writes a text in the FULL view, each row until `<|im_end|>`, up to step `stop`.

  The context does not change: a finished text is tokenised again and appended with `append_text`
  (docs/spec.md, section 7).

  Args:
    keys_B: PRNG keys; a row's token depends on its key and the step.
    stop: int32 scalar, last step to run; at most T.
  """
  B, T = draft.ids.shape
  before = cached(ctx, (FULL,))

  def step(d):
    und_B1D = model.apply({"params": params}, d.token[:, None], method="embed_text")
    zeros_B1 = jnp.zeros((B, 1), jnp.int32)
    tokens = Tokens(sample=zeros_B1, index=zeros_B1, split=zeros_B1, kind=zeros_B1 + CAUSAL)
    position_B1 = ctx.position[:, FULL, None] + d.step
    decoded = seen_before(jnp.broadcast_to(jnp.arange(T) < d.step, (B, T)))
    buffers, kv = _decode(model, params, {"und": und_B1D}, tokens, position_B1, before,
                          KeyValues(*map(jnp.concatenate, d.kv), decoded), loop=True)
    logits_BV = model.apply({"params": params}, buffers["und"][:, 0], method="text_logits")
    step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, d.step))(keys_B)
    token_B = next_token(logits_BV, step_keys_B, sampling)
    ended_B = d.ended | (token_B == special.text_end)
    ids_BT = lax.dynamic_update_slice_in_dim(
        d.ids, jnp.where(ended_B, 0, token_B)[:, None], d.step, axis=1)
    place = cpu.after(d.step, token_B)
    put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, place, axis=-2)
    return Draft(step=d.step + 1, token=token_B, ids=ids_BT, count=d.count + ~ended_B,
                 ended=ended_B, kv=jax.tree.map(put, d.kv, jax.tree.map(cpu.layers, kv)))

  # The static bound T tells `plan` the most turns that the loop can take.
  return lax.while_loop(lambda d: (d.step < T) & (d.step < stop) & ~jnp.all(d.ended), step, draft)


@functools.partial(jax.jit, static_argnames=("purpose",))
def row_keys(seeds_B, number, purpose: str):
  """PRNG keys [B] of the rows for "think", or a kind of `irg.Job.noise`, in round `number`.

  `seeds_B` is uint32.
  """
  index, fold = ("think", "noise", "posterior", "input").index(purpose), jax.random.fold_in
  return jax.vmap(lambda seed: fold(fold(jax.random.key(seed), number), index))(seeds_B)


def seeded_noise(seeds):
  """Function (kind, round, shape) -> standard normal float32, each row's from its own seed."""
  return functools.partial(_noise, np.array(seeds, np.uint32))


@functools.partial(jax.jit, static_argnames=("kind", "shape"))
def _noise(seeds_B, kind: str, number, shape):
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(row_keys(seeds_B, number, kind))


def next_token(logits_BV, keys_B, sampling: Sampling):
  """Samples a token from float32 logits for each row, int32 [B], independently of other rows."""
  likeliest_B = jnp.argmax(logits_BV, -1)
  logits_BV = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
  if sampling.top_k:
    kept = lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0]
    logits_BV = jnp.where(logits_BV < kept[:, -1:], -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    logits_BV = jnp.where(logits_BV < _nucleus_bound(logits_BV, sampling.top_p), -jnp.inf,
                          logits_BV)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
  return jnp.where(sampling.temperature > 0, drawn_B, likeliest_B).astype(jnp.int32)


def _nucleus_bound(logits_BV, top_p):
  """The lowest logit of the most likely tokens that together reach `top_p`, [B, 1]."""
  descending_BV = -jnp.sort(-logits_BV, -1)
  probability_BV = jax.nn.softmax(descending_BV, -1)
  before_BV = jnp.cumsum(probability_BV, -1) - probability_BV
  return jnp.min(jnp.where(before_BV < top_p, descending_BV, jnp.inf), -1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("model", "grid", "special", "views"))
def denoise(model, params, ctx: Context, x_BPC, times_M, guidance: Guidance | None, start, stop, *,
            grid, special: SpecialTokens, views):
  """Euler steps along the flow from time `times_M[start]` to `times_M[stop]`.

  Args:
    x_BPC: float32 [B, P, latent_dim], noise if `start` is 0.
    times_M: float32, see `flow.schedule`; a whole image takes the steps from 0 to M - 1.
    guidance: scales and renorm, for more than one view; its interval is the caller's business.
    start, stop: int32 scalars.
    grid: static (rows, columns) of the P latent tokens.
    views: static, see `context.guidance_views`.

  Returns:
    float32 [B, P, latent_dim]; clean latent tokens if `stop` is M - 1.
  """
  def step(state):
    i, x_BPC = state
    v = velocities(model, params, ctx, x_BPC, times_M[i], grid=grid, special=special, views=views)
    return i + 1, _updated(x_BPC, v, times_M, i, guidance)

  # The static bound tells `plan` the most turns that the loop can take.
  more = lambda state: (state[0] < len(times_M) - 1) & (state[0] < stop)
  return lax.while_loop(more, step, (jnp.int32(start), x_BPC.astype(jnp.float32)))[1]


@functools.partial(jax.jit, static_argnames=("model", "grid", "special", "passes", "turns"),
                   donate_argnames=("known",))
def denoise_forecast(model, params, ctx: Context, x_BPC, known, times_M, schedules, guidance, start,
                     stop, *, grid, special: SpecialTokens, passes, turns: int | None = None):
  """`denoise` that runs the decoder in some updates only, and forecasts the others.

  Args:
    known: {view: hidden state and differences [order + 1, B, P, D]}, see `forecast`, for the views
      of `guidance`; zeros before the first pass.
    schedules: {view: `forecast.Schedule`}, padded to the length of `times_M`.
    passes: static, the views that the decoder runs for in an update in which it runs.
    turns: static, a bound of such updates for `plan`; None: all.

  Returns:
    (float32 [B, P, latent_dim], `known` after the last update).
  """
  run_M = functools.reduce(jnp.logical_or, [schedules[view].passes for view in passes],
                           jnp.zeros(times_M.shape, bool))
  velocity = lambda h_BPD: model.apply({"params": params}, h_BPD, True, method="velocity")
  at_most = jnp.minimum(stop, len(times_M) - 1)

  def update(i, x_BPC, known):
    v = {VIEW_NAMES[view]: velocity(extrapolate(f_OBPD, schedules[view].since[i]))
         for view, f_OBPD in known.items()}
    return _updated(x_BPC, v, times_M, i, guidance)

  def forecasts(state):
    step = lambda state: (state[0] + 1, update(*state), state[2])
    return lax.while_loop(lambda state: (state[0] < at_most) & ~run_M[state[0]], step, state)

  def turn(counted):
    count, (i, x_BPC, known) = counted
    hidden = _hidden(model, params, ctx, x_BPC, times_M[i], grid, special, passes)
    known = known | {view: learn(known[view], hidden[view], schedules[view].order[i],
                                 schedules[view].distance[i]) for view in passes}
    return count + 1, forecasts((i + 1, update(i, x_BPC, known), known))

  state = forecasts((jnp.int32(start), x_BPC.astype(jnp.float32), known))
  if passes:
    bound = turns or len(times_M)
    more = lambda counted: (counted[0] < bound) & (counted[1][0] < at_most)
    state = lax.while_loop(more, turn, (jnp.int32(0), state))[1]
  return state[1:]


def _updated(x_BPC, v, times_M, i, guidance):
  """x after Euler step `i` along velocities `v` by view."""
  v_BPC = v["full"] if len(v) == 1 else flow.guide(
      v, guidance.text_scale, guidance.image_scale, guidance.renorm, guidance.renorm_min)
  return x_BPC - v_BPC * (times_M[i] - times_M[i + 1])


def velocities(model, params, ctx: Context, x_BPC, t, *, grid, special: SpecialTokens, views):
  """Velocities at x [B, P, latent_dim] and time t: dict of float32 [B, P, latent_dim] by view.

  All views run as one batch of R = B * W query rows against one cache.
  """
  hidden = _hidden(model, params, ctx, x_BPC, t, grid, special, views)
  rows_BWPD = jnp.stack([hidden[view] for view in views], 1)
  v_BWPC = model.apply({"params": params}, rows_BWPD, True, method="velocity")
  return {VIEW_NAMES[view]: v_BWPC[:, i] for i, view in enumerate(views)}


def _hidden(model, params, ctx, x_BPC, t, grid, special, views):
  """The hidden states of the latent tokens before the last norm, {view: [B, P, D]}."""
  apply = functools.partial(model.apply, {"params": params})
  B, P, _ = x_BPC.shape
  W = len(views)
  gen_BPD = apply(x_BPC, t, position_ids(*grid, model.config.max_latent_size),
                  method="embed_latents")
  gen_RPD = repeat(gen_BPD, "b p d -> (b w) p d", w=W)
  index_T = jnp.concatenate([jnp.array([0, P + 1]), 1 + jnp.arange(P)])
  index_RT = jnp.broadcast_to(index_T, (B * W, P + 2))
  zeros_RT = jnp.zeros_like(index_RT)
  tokens = Tokens(sample=zeros_RT, index=index_RT, split=zeros_RT, kind=zeros_RT + NOISE)
  position_RT = zeros_RT + rearrange(ctx.position[:, list(views)], "b w -> (b w) 1")
  buffers, _ = _decode(model, params, {"und": _image_ends(apply, special, B * W), "gen": gen_RPD},
                       tokens, position_RT, cached(ctx, views), loop=True, norm=False,
                       same_keys=True)
  gen_BWPD = rearrange(buffers["gen"], "(b w) p d -> b w p d", w=W)
  return {view: gen_BWPD[:, i] for i, view in enumerate(views)}


@functools.partial(jax.jit, static_argnames=("config", "grid"))
def decode_pixels(config: ModelConfig, params, latents_BPC, grid):
  """Latent tokens [B, P, latent_dim] -> 8-bit images, uint8 [B, height, width, 3].

  `params` are the VAE's; `grid` is static, (rows, columns) of latent tokens.
  """
  z_BYXC = unpatchify_latents(latents_BPC, *(g * config.latent_patch_size for g in grid),
                              config.latent_patch_size)
  vae = Vae(config.vae, config.dtype)
  return to_uint8(vae.apply({"params": params}, z_BYXC, method="decode"))


@functools.partial(jax.jit, static_argnames=("config",))
def encode_pixels(config: ModelConfig, params, pixels_BYXC, noise_BYXC=None):
  """Pixels [B, height, width, 3] in [-1, 1] -> clean latent tokens, float32 [B, P, latent_dim].

  `params` are the VAE's. `noise_BYXC`, standard normal, [B, Y, X, z_channels] at the latents'
  resolution, samples the posterior; None takes its mean.
  """
  pixels_BYXC = constrain(pixels_BYXC, "batch", None, None, None)
  moments = Vae(config.vae, config.dtype).apply({"params": params}, pixels_BYXC, method="encode")
  return patchify_latents(sample_latents(config.vae, *moments, noise_BYXC),
                          config.latent_patch_size)


def _decode(model, params, buffers, tokens, position_RT, *caches, **how):
  return model.apply({"params": params}, buffers, tokens, position_RT, caches, method="decode",
                     **how)


def _image_ends(apply, special, rows):
  """Embeddings of <start of image> and <end of image>, [rows, 2, D]."""
  ends_12D = apply(jnp.array([[special.image_start, special.image_end]]), method="embed_text")
  return repeat(ends_12D, "1 t d -> b t d", b=rows)
