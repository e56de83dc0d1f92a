"""The Mixture-of-Transformers decoder as two dense buffers.

A row is two buffers: `und` [R, U, D] (text, special and ViT tokens) and `gen` [R, G, D]
(VAE latent tokens). Each expert runs on its own buffer, so nothing is routed; the two meet
only in attention, which sees the concatenation [und | gen]. The mask is made of metadata,
so the order within that concatenation is free (spec section 2, design "two buffers").
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from irg_jax.config import ModelConfig
from irg_jax.model.attention import KeyValues, attend
from irg_jax.tokens import Tokens
from irg_jax.model.layers import RMSNorm, apply_rope, dense, rope_table, scan_layers
from irg_jax.sharding import constrain, on_lone_cpu


EXPERTS = ("und", "gen")  # the order of the buffers in the concatenation


class Expert(nn.Module):
  """One expert's weights of one layer. A namespace of two steps, before and after attention."""

  config: ModelConfig

  def setup(self):
    c, llm = self.config, self.config.llm
    linear = lambda features, bias=False: dense(c, features, bias)
    norm = lambda: RMSNorm(llm.norm_eps, c.param_dtype)
    self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm = norm(), norm(), norm(), norm()
    self.q = linear(llm.num_heads * llm.head_dim, bias=True)
    self.k = linear(llm.num_kv_heads * llm.head_dim, bias=True)
    self.v = linear(llm.num_kv_heads * llm.head_dim, bias=True)
    self.o = linear(llm.hidden_size)
    self.gate, self.up = linear(llm.mlp_size), linear(llm.mlp_size)
    self.down = linear(llm.hidden_size)

  def queries_keys_values(self, x_RTD, cos, sin):
    """[R, T, D] -> q [R, T, N, H], k and v [R, T, K, H]; q and k normalised and rotated."""
    H = self.config.llm.head_dim  # no -1 in reshape: a buffer may be empty
    heads = lambda x: x.reshape(*x.shape[:-1], x.shape[-1] // H, H)
    x_RTD = self.attn_norm(x_RTD)
    q = apply_rope(self.q_norm(heads(self.q(x_RTD))), cos, sin)
    k = apply_rope(self.k_norm(heads(self.k(x_RTD))), cos, sin)
    return q, k, heads(self.v(x_RTD))

  def finish(self, x_RTD, attended_RTNH):
    """Adds the attention's output projection, then the MLP."""
    N, H = attended_RTNH.shape[-2:]
    x_RTD = x_RTD + self.o(attended_RTNH.reshape(*x_RTD.shape[:-1], N * H))
    h = self.mlp_norm(x_RTD)
    h = constrain(nn.silu(self.gate(h)) * self.up(h), "batch", "length", "mlp")
    return constrain(x_RTD + self.down(h), "batch", "length", "embed")


class Layer(nn.Module):
  """One layer: both experts up to attention, one attention, both experts after it."""

  config: ModelConfig
  attention: str

  @nn.compact
  def __call__(self, buffers, cached, tokens: Tokens, rope, cached_tokens):
    """See `Decoder`. `cached` is this layer's (k, v) of every cache, in order."""
    places = _places(buffers)
    experts = {name: Expert(self.config, name=name) for name in places}
    qkv = [experts[name].queries_keys_values(buffers[name], *(r[:, place] for r in rope))
           for name, place in places.items()]
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*qkv))
    q = constrain(q, "batch", "length", "heads", None)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    sources = [KeyValues(k, v, tokens)]
    sources += [KeyValues(*kv, keys) for kv, keys in zip(cached, cached_tokens)]
    attended = attend(q, tokens, sources, implementation=self.attention)
    buffers = {name: experts[name].finish(buffers[name], attended[:, place])
               for name, place in places.items()}
    return buffers, (k, v)


class Decoder(nn.Module):
  """All layers and the final norms."""

  config: ModelConfig
  attention: str = "auto"

  @nn.compact
  def __call__(self, buffers, tokens: Tokens, position, caches=()):
    """Runs the layers on one or both buffers.

    Args:
      buffers: dict with "und" [R, U, D] and/or "gen" [R, G, D]. A buffer that is left out
        costs nothing: its expert is not run.
      tokens: metadata of the concatenated buffers, `und` first, [R, U + G].
      position: int [R, U + G], rotary positions.
      caches: sequence of KeyValues whose k and v are [layers, B, K, S, H] (see
        `attention.KeyValues` for how R and B relate). They are read, never written.

    Returns:
      (buffers after the final norms, (k, v) of these tokens, each [layers, R, K, U + G, H]).
      With parameters from `unstack_layers`, `layers` is a list there, as it may be in caches.
    """
    llm = self.config.llm
    rope = rope_table(position, llm.head_dim, llm.rope_theta)
    cached, cached_tokens = [(c.k, c.v) for c in caches], [c.tokens for c in caches]
    buffers = {name: constrain(x.astype(self.config.dtype), "batch", "length", "embed")
               for name, x in buffers.items()}
    apart = self.get_variable("params", "layers")
    if isinstance(apart, list):  # see `unstack_layers`
      buffers, kv = self._one_by_one(apart, buffers, cached, tokens, rope, cached_tokens)
    else:
      layers = scan_layers(
          Layer, llm.num_layers, self.config.remat,
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
          config=self.config, attention=self.attention)
      buffers, kv = layers(buffers, cached, tokens, rope, cached_tokens)
    norms = {name: RMSNorm(llm.norm_eps, self.config.param_dtype, name=f"{name}_norm")
             for name in buffers}
    return {name: norms[name](x) for name, x in buffers.items()}, kv

  def _one_by_one(self, params, buffers, cached, *args):
    layer, new = Layer(self.config, self.attention, parent=None), []
    for i, weights in enumerate(params):
      buffers, kv = layer.apply({"params": weights}, buffers, [(k[i], v[i]) for k, v in cached],
                                *args)
      new.append(kv)
    return buffers, tuple(map(list, zip(*new)))


def unstack_layers(params):
  """The transformer's parameters with the decoder's layers as `unstack` leaves them.

  A loop of many decoder passes, and a training step, do better to take the stack apart once,
  in front of it; `Decoder` accepts both forms.
  """
  layers = unstack(params["decoder"]["layers"])
  return params | {"decoder": params["decoder"] | {"layers": layers}}


def unstack(layers):
  """On a lone CPU, a stack of layers [layers, ...] as a list of trees; elsewhere as it is.

  XLA's backend for it copies each layer's weights out of the stack every time the scan comes
  by, and its gradients and keys into another.
  """
  if not on_lone_cpu():
    return layers
  count = jax.tree.leaves(layers)[0].shape[0]
  return [jax.tree.map(lambda x: x[i], layers) for i in range(count)]


def _places(buffers):
  """The slice of each buffer in the concatenation, by name and in order."""
  places, start = {}, 0
  for name in EXPERTS:  # never the dict's own order, which passing through JAX may change
    if name in buffers:
      places[name] = slice(start, start + buffers[name].shape[1])
      start = places[name].stop
  return places
