"""Random arrays of `benchmarks/device.py`, made on the device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from irg_jax.config import ModelConfig
from irg_jax.generate.context import VIEWS, cached, new_context
from irg_jax.model.attention import KeyValues
from irg_jax.tokens import NOISE, Tokens
from irg_jax.weights import names


def arrays(tokens: Tokens, N: int, K: int, H: int, dtype: str):
  """Random q, k, v and gradient of the output for one row of tokens."""
  B, T = tokens.sample.shape
  shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H), (B, T, N, H)
  return tuple(normal(i, 0, shape, dtype, 1.0) for i, shape in enumerate(shapes))


def cached_arrays(config: ModelConfig, pixels: int, slots: int, dtype: str):
  """Queries of an image of one row in all views, their tokens and keys, and those of a cache."""
  config = dataclasses.replace(
      config, dtype=dtype, llm=dataclasses.replace(config.llm, num_layers=1))
  llm, T = config.llm, (pixels // config.pixel_stride) ** 2 + 2
  query = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(VIEWS), T)), Tokens(
      sample=jnp.int32(0), index=jnp.arange(T), split=jnp.int32(0), kind=jnp.int32(NOISE)))
  q_RTNH, k_RKTH, v_RKTH, _ = arrays(query, llm.num_heads, llm.num_kv_heads, llm.head_dim, dtype)
  ctx = full_context(config, 1, slots)
  return (q_RTNH, query, KeyValues(k_RKTH, v_RKTH, query),
          KeyValues(ctx.k[0], ctx.v[0], cached(ctx, VIEWS).tokens))


def full_context(config: ModelConfig, batch: int, size: int):
  """A full context of random keys; the views see all of it, 15/16 and 3/16."""
  ctx, llm = new_context(config, batch, size), config.llm
  size = ctx.visible.shape[-1]
  k, v = (normal(i, llm.num_layers, ctx.k.shape[1:], config.dtype, 1.0) for i in (1, 2))
  sees_W1 = jnp.array([[size], [size * 15 // 16], [size * 3 // 16]])
  return dataclasses.replace(
      ctx, k=k, v=v, length=ctx.length + size, position=ctx.position + size,
      visible=jnp.broadcast_to(jnp.arange(size) < sees_W1, ctx.visible.shape))


def random_weights(config: ModelConfig, dtype: str, vit: bool = False) -> dict:
  """Parameters of the transformer, made on the device; the ViT's and its connector's if `vit`."""
  leaves = {}
  for number, row in enumerate(names.rows(config)):
    part, _, path = row.path.partition("/")
    if part != "transformer" or not vit and path.startswith(("vit/", "connector/")):
      continue
    kind = path.rsplit("/", 1)[-1]
    if kind in ("scale", "bias"):
      leaves[path] = jnp.full(row.shape, kind == "scale", dtype)
    else:
      std = 1.0 if kind == "embedding" else math.prod(row.layer_shape[:-1]) ** -0.5
      leaves[path] = normal(number, row.layers, row.layer_shape, dtype, std)
  return names.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def normal(seed, layers: int, shape, dtype: str, std):
  """Normal numbers [*shape], or [layers, *shape] made layer by layer, so that little is held."""
  key = jax.random.key(seed)
  one = lambda key: jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
  return lax.map(one, jax.random.split(key, layers)) if layers else one(key)
