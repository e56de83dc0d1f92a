"""The Mixture-of-Transformers decoder on two dense buffers (docs/spec.md, section 2).

A row has two buffers: `und` [R, U, D] (text, special and ViT tokens) and `gen` [R, G, D] (VAE
latent tokens). Each expert runs on its own buffer, so no token is routed. The experts meet only
in attention, over the concatenation [und | gen]. Its order is free, since the mask depends on
token metadata alone.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat

from irg_jax.config import ModelConfig
from irg_jax.model.attention import KeyValues, attend, prepare
from irg_jax.model.layers import apply_rope, dense, rms_norm, rope_table, scan_layers
from irg_jax.sharding import constrain, kv_copies
from irg_jax.tokens import Tokens

EXPERTS = ("und", "gen")  # the order of the buffers in the concatenation


class Expert(nn.Module):
  """One expert's weights in one layer: what runs before attention, and what runs after it."""

  config: ModelConfig

  def setup(self):
    c, llm = self.config, self.config.llm
    norm = lambda: rms_norm(c)
    self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm = norm(), norm(), norm(), norm()
    self.q = dense(c, llm.num_heads * llm.head_dim)
    self.k = dense(c, llm.num_kv_heads * llm.head_dim)
    self.v = dense(c, llm.num_kv_heads * llm.head_dim)
    self.o = dense(c, llm.hidden_size, bias=False)
    self.gate, self.up = (dense(c, llm.mlp_size, bias=False) for _ in range(2))
    self.down = dense(c, llm.hidden_size, bias=False)

  def queries_keys_values(self, x_RTD, cos_RTH, sin_RTH):
    """q [R, T, N, H], k and v [R, T, K, H]; q and k are normalised and rotated."""
    heads = lambda x: rearrange(x, "r t (n h) -> r t n h", h=self.config.llm.head_dim)
    x_RTD = self.attn_norm(x_RTD)
    q_RTNH = apply_rope(self.q_norm(heads(self.q(x_RTD))), cos_RTH, sin_RTH)
    k_RTKH = apply_rope(self.k_norm(heads(self.k(x_RTD))), cos_RTH, sin_RTH)
    return q_RTNH, k_RTKH, heads(self.v(x_RTD))

  def finish(self, x_RTD, attended_RTNH):
    """Adds the output projection of attention, then the MLP."""
    x_RTD = x_RTD + self.o(rearrange(attended_RTNH, "r t n h -> r t (n h)"))
    h_RTD = self.mlp_norm(x_RTD)
    h_RTF = constrain(nn.silu(self.gate(h_RTD)) * self.up(h_RTD), "batch", "length", "mlp")
    return constrain(x_RTD + self.down(h_RTF), "batch", "length", "embed")


class Layer(nn.Module):
  """One layer: both experts, joint attention, both experts."""

  config: ModelConfig
  same_keys: bool = False  # see `attend`

  @nn.compact
  def __call__(self, buffers, cached, tokens: Tokens, rope, cached_tokens, prepared):
    """See `Decoder`. `cached` is this layer's (k, v) of every cache, in order."""
    slices = _slices(buffers)
    experts = {name: Expert(self.config, name=name) for name in slices}
    qkv = [experts[name].queries_keys_values(buffers[name], *(x_RTH[:, place] for x_RTH in rope))
           for name, place in slices.items()]
    q_RTNH, *kv = (jnp.concatenate(parts, axis=1) for parts in zip(*qkv))
    q_RTNH = constrain(q_RTNH, "batch", "length", "heads", None)
    copies = kv_copies(self.config.llm)
    k_RKTH, v_RKTH = (repeat(x, "r t k h -> r (k c) t h", c=copies) for x in kv)
    sources = [KeyValues(k_RKTH, v_RKTH, tokens)]
    sources += [KeyValues(*kv, keys) for kv, keys in zip(cached, cached_tokens)]
    attended_RTNH = attend(q_RTNH, tokens, sources, implementation=self.config.attention,
                           prepared=prepared, same_keys=self.same_keys)
    buffers = {name: experts[name].finish(buffers[name], attended_RTNH[:, place])
               for name, place in slices.items()}
    return buffers, (k_RKTH, v_RKTH)


class Decoder(nn.Module):
  """All layers and the final norms."""

  config: ModelConfig

  def setup(self):
    self.und_norm, self.gen_norm = rms_norm(self.config), rms_norm(self.config)

  @nn.compact
  def __call__(self, buffers, tokens: Tokens, position_RT, caches=(), loop: bool = False,
               norm: bool = True, same_keys: bool = False):
    """Runs the layers on one or both buffers.

    Args:
      buffers: dict with "und" [R, U, D] and/or "gen" [R, G, D]. The expert of a missing buffer
        is not run.
      tokens: metadata of the concatenated buffers, `und` first, [R, T] with T = U + G.
      position_RT: int32, rotary positions.
      caches: sequence of KeyValues with k and v [L, B, K, S, H] (see `attention.KeyValues` for
        B and R); read, never written.
      loop: static, whether this is the body of a loop over tokens or flow steps.
      norm: static, whether the final norms are applied.
      same_keys: static, see `attention.attend`.

    Returns:
      (buffers after the final norms, (k, v) of these tokens, each [L, R, K, T, H], K times
      `sharding.kv_copies`).
    """
    c, llm = self.config, self.config.llm
    rope = rope_table(position_RT, llm.head_dim, llm.rope_theta)
    cached, cached_tokens = [(s.k, s.v) for s in caches], [s.tokens for s in caches]
    rows = [len(tokens.sample), *(s.k.shape[1] for s in caches)]
    group = llm.num_heads // (llm.num_kv_heads * kv_copies(llm))
    prepared = prepare(tokens, [tokens, *cached_tokens], rows, group, llm.head_dim, c.attention)
    buffers = {name: constrain(x_RTD.astype(c.dtype), "batch", "length", "embed")
               for name, x_RTD in buffers.items()}
    layers = scan_layers(Layer, llm.num_layers, c.remat,
                         in_axes=(0, *[nn.broadcast] * 4), loop=loop, config=c, same_keys=same_keys)
    buffers, kv = layers(buffers, cached, tokens, rope, cached_tokens, prepared)
    norms = {"und": self.und_norm, "gen": self.gen_norm}
    return {name: norms[name](x) if norm else x for name, x in buffers.items()}, kv


def _slices(buffers):
  """The slice of each buffer in the concatenation, by name and in order."""
  slices, start = {}, 0
  for name in EXPERTS:  # not the dict's order: JAX sorts the keys of a dict
    if name in buffers:
      slices[name] = slice(start, start + buffers[name].shape[1])
      start = slices[name].stop
  return slices
