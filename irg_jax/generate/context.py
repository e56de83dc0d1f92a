"""The context of a batch of conversations: one KV cache, seen through several views.

Classifier-free guidance needs the velocity under contexts that lack something. These are not
copies of the cache. A view is a row of booleans (the slots that it sees) and a rotary position
(of its next token); forking a view copies only those.

    view       stands for                           sees
    FULL       the conversation                     all slots but private ones
    NO_TEXT    ... without the newest text          a fork of FULL, made before that text
    NO_IMAGE   ... without any image                texts; those after an image are appended
                                                    a second time, into private slots

Rows have their own lengths. A slot in use may be invisible to a view, so an empty view (no system
prompt) is no special case.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from irg_jax.config import ModelConfig
from irg_jax.model.attention import KeyValues
from irg_jax.model.kernels import cpu
from irg_jax.sharding import constrain, kv_copies
from irg_jax.tokens import CAUSAL, PADDING, Tokens

FULL, NO_TEXT, NO_IMAGE = VIEWS = range(3)

# Appended texts are padded to the next of these lengths, so that few shapes are compiled.
LADDER = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_KV_AXES = ("layers", "batch", "heads", None, None)
_CACHE_MULTIPLE = 512  # so that blocks of keys (`blockwise.key_size`) divide the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Cache and views of B rows."""

  k: jax.Array  # [L, B, K, S, H], rotated, in the compute dtype; or see `in_layers`
  v: jax.Array  # likewise, not rotated
  length: jax.Array  # int32 [B], slots in use
  visible: jax.Array  # bool [B, W, S], slots that each view sees
  position: jax.Array  # int32 [B, W], rotary position of each view's next token


def rung(length: int, name: str = "a text") -> int:
  """Padded length of an appended text; ValueError, with `name`, if the text is too long."""
  for step in LADDER:
    if length <= step:
      return step
  raise ValueError(f"{name} of {length} tokens is longer than the {LADDER[-1]} that are supported")


@functools.partial(jax.jit, static_argnames=("config", "batch", "size"))
def new_context(config: ModelConfig, batch: int, size: int) -> Context:
  """An empty context of `batch` rows with at least `size` slots each."""
  size = -(-size // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
  k, v = new_kv(config, batch, size)
  return lay_out(Context(
      k=k, v=v, length=jnp.zeros((batch,), jnp.int32),
      visible=jnp.zeros((batch, len(VIEWS), size), bool),
      position=jnp.zeros((batch, len(VIEWS)), jnp.int32)))


def new_kv(config: ModelConfig, batch: int, size: int) -> tuple[jax.Array, jax.Array]:
  """Keys and values of `size` empty slots, [L, B, K, size, H] each."""
  llm = config.llm
  zeros_LBKSH = constrain(jnp.zeros(
      (llm.num_layers, batch, llm.num_kv_heads * kv_copies(llm), size, llm.head_dim),
      config.dtype), *_KV_AXES)
  return zeros_LBKSH, zeros_LBKSH


def lay_out(ctx: Context) -> Context:
  """The context sharded by rows and heads (a no-op without a mesh)."""
  kv = lambda x: constrain(x, *_KV_AXES)
  rows = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1))
  return Context(kv(ctx.k), kv(ctx.v), rows(ctx.length), rows(ctx.visible), rows(ctx.position))


def fork(ctx: Context, source: int, target: int) -> Context:
  """Makes view `target` a copy of view `source`."""
  visible, position = _forked((ctx.visible, ctx.position), source, target)
  return dataclasses.replace(ctx, visible=visible, position=position)


@jax.jit
def _forked(views, source, target):
  return jax.tree.map(lambda x: x.at[:, target].set(x[:, source]), views)


def cached(ctx: Context, views) -> KeyValues:
  """Keys and values for R = B * W query rows: the W `views` of a row lie together."""
  stack = lambda x: jnp.concatenate(x) if isinstance(x, list) else x
  return KeyValues(stack(ctx.k), stack(ctx.v), seen_before(
      rearrange(ctx.visible[:, jnp.array(views)], "b w s -> (b w) s")))


def in_layers(ctx: Context) -> Context:
  """The context to be read by many calls; on a lone CPU each would slice its layers again."""
  return _in_layers(ctx) if cpu.on_lone_cpu() else ctx


@jax.jit
def _in_layers(ctx):
  return dataclasses.replace(ctx, k=cpu.layers(ctx.k), v=cpu.layers(ctx.v))


def seen_before(visible_RS) -> Tokens:
  """Metadata of slots: the visible ones precede every new token, the others are padding."""
  before_RS = jnp.full(visible_RS.shape, -1, jnp.int32)
  return Tokens(sample=jnp.where(visible_RS, 0, PADDING), index=before_RS, split=before_RS,
                kind=jnp.full_like(before_RS, CAUSAL))


def write(ctx: Context, kv) -> Context:
  """Writes keys and values [L, B, K, T, H] into the T slots after each row's length.

  A write past the last slot is dropped silently: size the cache with `plan_cache`.
  """
  row_B1 = jnp.arange(len(ctx.length))[:, None]
  slot_BT = ctx.length[:, None] + jnp.arange(kv[0].shape[3])
  # A scatter, not a slice update for each row: XLA's CPU backend would copy the cache each time.
  put = lambda cache_LBKSH, new_LBKTH: cache_LBKSH.at[:, row_B1, :, slot_BT].set(
      rearrange(new_LBKTH, "l b k t h -> b t l k h").astype(cache_LBKSH.dtype),
      unique_indices=True)
  return lay_out(dataclasses.replace(ctx, k=put(ctx.k, kv[0]), v=put(ctx.v, kv[1])))


def view_mask(views) -> np.ndarray:
  """Whether each view is one of `views`, bool [W]."""
  return np.isin(VIEWS, views)


def claim(ctx: Context, count_B, sees_W, advance) -> Context:
  """Takes the next int32 `count_B` slots of each row into use, visible to the views `sees_W`.

  `advance`, int32 [B] or scalar, is added to the positions of these views.
  """
  slot_S = jnp.arange(ctx.visible.shape[-1])
  length_B = ctx.length + count_B
  new_BS = (slot_S >= ctx.length[:, None]) & (slot_S < length_B[:, None])
  advance_B = jnp.broadcast_to(advance, count_B.shape)
  return dataclasses.replace(
      ctx, length=length_B,
      visible=ctx.visible | (new_BS[:, None] & sees_W[:, None]),
      position=ctx.position + advance_B[:, None] * sees_W)


def guidance_views(guidance) -> tuple[int, ...]:
  """The views that a `settings.Guidance` combines, FULL first; FULL alone without guidance."""
  if guidance.text_scale <= 1:
    return (FULL,)
  return (FULL, NO_TEXT, NO_IMAGE) if guidance.image_scale > 1 else (FULL, NO_TEXT)


def plan_cache(config: ModelConfig, settings, system_tokens: int, images=()) -> tuple[int, int]:
  """Slots of the cache for each row, and the number of earlier rounds that fit into it.

  Both follow from the `settings.Settings` and the length of the system prompt, not from the texts
  of a row or its neighbours, so neither shapes nor results depend on those.

  Args:
    images: (height, width) of each input image of a row.

  Raises:
    ValueError: an image with more pixels than the model has positions for, a system prompt that
      is too long, or a `cache_size` too small for one earlier round.
  """
  s, thought = settings, rung(settings.think_limit + 1)
  prompt = rung(s.max_prompt_tokens + 2)
  base = rung(system_tokens + 2, "a system prompt") + prompt + thought
  base += sum(_image_slots(config, s, *size) for size in images)
  if images:
    base += prompt + thought  # appended twice: private slots of NO_IMAGE
  earlier = s.rounds - 1
  copies = 2 if NO_IMAGE in guidance_views(s.later) else 1  # of a thought after an image
  one_round = copies * thought + _image_slots(config, s, s.height, s.width) if earlier else 0
  window = min(earlier, s.window or s.rounds)
  if s.cache_size is not None:
    window = min(window, (s.cache_size - base) // max(one_round, 1))
    _check_fits(s, base + one_round)
  return s.cache_size or base + one_round * window, window


def plan_answer(config: ModelConfig, settings, system_tokens: int, texts, images=()) -> int:
  """Slots of the cache for a row of `answer.answer`, a conversation.

  `texts` are the tokens of its texts; a lone one gets room for the longest prompt. Other arguments
  and errors as of `plan_cache`.
  """
  lengths = [settings.max_prompt_tokens] if len(texts) == 1 else texts
  need = rung(system_tokens + 2, "a system prompt") + rung(settings.think_limit + 1)
  need += sum(rung(length + 2) for length in lengths)
  need += sum(_image_slots(config, settings, *size, vae=False) for size in images)
  _check_fits(settings, need)
  return settings.cache_size or need


def _check_fits(settings, need):
  if (settings.cache_size or need) < need:
    raise ValueError(f"cache_size {settings.cache_size} is too small: these settings need at least "
                     f"{need} slots a row; raise cache_size, or lower think_limit or the size")


def _image_slots(config, settings, height, width, vae=True):
  """Slots of an image that is appended, each split with its two ends."""
  size = settings.vae_transform.size(width, height)
  slots = 0
  if vae:
    slots = _image_tokens("vae_transform", settings, size, config.pixel_stride,
                          config.max_latent_size) + 2
  size = settings.vit_transform.size(*size)
  return slots + 2 + _image_tokens("vit_transform", settings, size, config.vit.patch_size,
                                   config.vit.grid_size)


def _image_tokens(name, settings, size, stride, grid):
  """Tokens of an image that the transform `name` resizes to `size` (width, height)."""
  if getattr(settings, name).stride % stride:
    raise ValueError(f"{name}.stride is {getattr(settings, name).stride}, but must be a multiple "
                     f"of {stride} pixels, one token of this model")
  if max(size) > stride * grid:
    raise ValueError(f"{name} reads images back at {size[0]} x {size[1]} pixels, but this model "
                     f"has positions for {stride * grid} a side: lower {name}.max_size and "
                     f"{name}.min_size (with --config.{name}.min_size=N and so on)")
  return (size[0] // stride) * (size[1] // stride)
