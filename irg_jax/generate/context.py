"""The context of a batch of conversations: one cache, seen through several views.

Classifier-free guidance needs the velocity under contexts that lack something. Those are
not copies of the cache: a view is a row of booleans (which slots it sees) and a rotary
position (where its next token stands), and forking a view copies just these.

    view       what it stands for                   sees
    FULL       the conversation                     everything but private slots
    NO_TEXT    ... without the newest text          a fork of FULL, taken before that text
    NO_IMAGE   ... without any image              texts; those after an image are read a
                                                    second time, into private slots

Rows have lengths of their own. A slot in use is invisible to a view rather than absent, so
an empty view (no system prompt) is nothing special.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from irg_jax.config import ModelConfig
from irg_jax.model.attention import KeyValues
from irg_jax.tokens import CAUSAL, PADDING, Tokens
from irg_jax.sharding import constrain

FULL, NO_TEXT, NO_IMAGE = VIEWS = range(3)

# Appended texts are padded to the next of these lengths, so that few shapes ever compile.
LADDER = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_KV_AXES = ("layers", "batch", "heads", None, None)
_CACHE_MULTIPLE = 512  # so that blocks of keys (`blockwise.key_size`) divide the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Cache and views of B rows.

  Attributes:
    k, v: [layers, B, K, S, H] keys (rotated) and values, in the compute dtype.
    length: int32 [B], slots in use.
    visible: bool [B, views, S].
    position: int32 [B, views], rotary position of the next token.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array
  visible: jax.Array
  position: jax.Array


def rung(length: int, name: str = "a text") -> int:
  """The padded length of an appended text; `name` is what errors call it.

  Raises:
    ValueError: longer than the ladder's top.
  """
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
  """Keys and values of `size` empty slots, each [layers, batch, K, size, H]."""
  llm = config.llm
  kv = jnp.zeros((llm.num_layers, batch, llm.num_kv_heads, size, llm.head_dim), config.dtype)
  kv = constrain(kv, *_KV_AXES)
  return kv, kv


def lay_out(ctx: Context) -> Context:
  """The context sharded by rows and heads (a no-op without a mesh)."""
  kv = lambda x: constrain(x, *_KV_AXES)
  rows = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1))
  return Context(kv(ctx.k), kv(ctx.v), rows(ctx.length), rows(ctx.visible), rows(ctx.position))


def fork(ctx: Context, source: int, target: int) -> Context:
  """Makes view `target` what view `source` is now."""
  return dataclasses.replace(
      ctx, visible=ctx.visible.at[:, target].set(ctx.visible[:, source]),
      position=ctx.position.at[:, target].set(ctx.position[:, source]))


def cached(ctx: Context, views) -> KeyValues:
  """The cache as `len(views)` consecutive query rows for each row of the batch see it.

  Args:
    views: static sequence of views.

  Returns:
    KeyValues for `Decoder`: every visible slot lies before every new token.
  """
  visible = ctx.visible[:, jnp.array(views)]
  return KeyValues(ctx.k, ctx.v, seen_before(visible.reshape(-1, visible.shape[-1])))


def seen_before(visible) -> Tokens:
  """Metadata of slots, bool [R, S]: those that are visible lie before every new token."""
  before = jnp.full(visible.shape, -1, jnp.int32)
  return Tokens(sample=jnp.where(visible, 0, PADDING), index=before, split=before,
                kind=jnp.full_like(before, CAUSAL))


def write(ctx: Context, kv) -> Context:
  """Puts keys and values [layers, B, K, T, H] into the slots after each row's length.

  The T slots must exist (a write past the end is dropped, not refused): callers size the
  cache before they start.
  """
  row = jnp.arange(len(ctx.length))[:, None]
  slot = ctx.length[:, None] + jnp.arange(kv[0].shape[3])
  # A scatter, not a slice for each row: XLA's CPU backend copies the cache for each slice.
  put = lambda cache, new: cache.at[:, row, :, slot].set(
      new.transpose(1, 3, 0, 2, 4).astype(cache.dtype), unique_indices=True)
  k, v = put(ctx.k, kv[0]), put(ctx.v, kv[1])
  return lay_out(dataclasses.replace(ctx, k=k, v=v))


def claim(ctx: Context, count, views, advance) -> Context:
  """Takes the next `count` slots of each row into use, visible to `views`.

  Args:
    count: int32 [B].
    advance: int32 [B] or scalar, how far the positions of `views` move on.
  """
  slot = jnp.arange(ctx.visible.shape[-1])
  new = (slot >= ctx.length[:, None]) & (slot < (ctx.length + count)[:, None])
  views = jnp.array(views)
  visible = ctx.visible.at[:, views].set(ctx.visible[:, views] | new[:, None])
  position = ctx.position.at[:, views].add(jnp.broadcast_to(advance, count.shape)[:, None])
  return dataclasses.replace(ctx, length=ctx.length + count, visible=visible, position=position)
