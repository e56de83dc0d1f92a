"""The unified transformer: embeddings of all token kinds, decoder and heads."""

import flax.linen as nn
import jax.numpy as jnp

from irg_jax.config import ModelConfig
from irg_jax.model.decoder import Decoder
from irg_jax.model.layers import dense, sincos_2d, timestep_features
from irg_jax.model.vit import Vit
from irg_jax.sharding import lookup, pick


class Heads(nn.Module):
  """Linear prediction heads on the decoder's hidden states [..., D].

  A fork's new head is a line here and a row for its parameters in `weights/names.py` and
  `sharding.py`; call it as `model.heads.<name>(hidden)`.

  text: next-token logits [..., V], on the und buffer.
  velocity: flow velocity of a latent token [..., latent_dim], on the gen buffer.
  """

  config: ModelConfig

  def setup(self):
    self.text = dense(self.config, self.config.llm.vocab_size, bias=False)
    self.velocity = dense(self.config, self.config.latent_dim)


class TwoLayer(nn.Module):
  """Linear, activation, linear."""

  features: int
  activation: str
  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    hidden = dense(self.config, self.features, name="fc1")(x)
    return dense(self.config, self.features, name="fc2")(getattr(nn, self.activation)(hidden))


class UnifiedTransformer(nn.Module):
  """Embeddings, decoder and heads; use through `init` and `apply(..., method=...)`.

  `config` holds sizes, dtypes and the implementation of attention.
  """

  config: ModelConfig

  def setup(self):
    c = self.config
    width = c.llm.hidden_size
    self.embed = nn.Embed(c.llm.vocab_size, width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.latent_embed = dense(c, width)
    self.time_embed = TwoLayer(width, "silu", c)
    self.vit = Vit(c)
    self.connector = TwoLayer(width, "gelu", c)
    self.decoder = Decoder(c)
    self.heads = Heads(c)

  def embed_text(self, ids_BT):
    """Embeddings of token ids, [B, T, D] in the compute dtype."""
    return lookup(self.embed.embedding, ids_BT).astype(self.config.dtype)

  def embed_latents(self, latents_PC, timestep_P, position_P):
    """Embeddings of latent tokens with their flow time and position, [..., P, D].

    Args:
      latents_PC: float [..., P, latent_dim].
      timestep_P: float, broadcastable to [..., P]; 0 for clean images.
      position_P: int, broadcastable to [..., P]; `row * max_latent_size + column`.
    """
    c = self.config
    time_PD = self.time_embed(timestep_features(timestep_P))
    place_PD = sincos_2d(position_P, c.max_latent_size, c.llm.hidden_size).astype(c.dtype)
    return self.latent_embed(latents_PC) + time_PD + place_PD

  def encode_vit(self, patches_RPC, position_RP, image_RP):
    """ViT hidden states, [R, P, ViT width]; arguments as in `Vit`."""
    return self.vit(patches_RPC, position_RP, image_RP)

  def embed_vit(self, patches_RPC, position_RP, image_RP):
    """ViT tokens as input of the decoder, [R, P, D]; arguments as in `Vit`."""
    c = self.config
    place_RPD = sincos_2d(position_RP, c.vit.grid_size, c.llm.hidden_size).astype(c.dtype)
    return self.connector(self.vit(patches_RPC, position_RP, image_RP)) + place_RPD

  def decode(self, buffers, tokens, position_RT, caches=(), **how):
    """See `decoder.Decoder`."""
    return self.decoder(buffers, tokens, position_RT, caches, **how)

  def text_logits(self, und_D):
    """Next-token logits, float32 [..., V], of hidden states [..., D]."""
    return self.heads.text(und_D).astype(jnp.float32)

  def velocity(self, gen_D, norm: bool = False):
    """Flow velocity, float32 [..., latent_dim], of hidden states [..., D].

    `norm`, static: they come from `decode` without its final norms.
    """
    gen_D = self.decoder.gen_norm(gen_D) if norm else gen_D
    return self.heads.velocity(gen_D).astype(jnp.float32)

  def __call__(self, batch, latents_BGC, timestep_BG):
    """Training forward pass over packed rows.

    Args:
      batch: `data.batch.Batch`.
      latents_BGC: float [B, G, latent_dim], noised to `timestep_BG`.
      timestep_BG: float, flow time of each latent token, 0 on clean ones.

    Returns:
      (hidden states of the und buffer [B, U, D], for `text_logits` at the places with a loss;
      velocity float32 [B, G, latent_dim]).
    """
    und_BUD = self.embed_text(batch.text_ids)
    if batch.vit_patches.shape[1]:
      vit_BPD = self.embed_vit(batch.vit_patches, batch.vit_position, batch.vit_image)
      vit_BUD = pick(vit_BPD, jnp.maximum(batch.vit_index, 0))
      und_BUD = jnp.where((batch.vit_index >= 0)[..., None], vit_BUD, und_BUD)
    gen_BGD = self.embed_latents(latents_BGC, timestep_BG, batch.latent_position)
    buffers, _ = self.decode({"und": und_BUD, "gen": gen_BGD}, batch.tokens, batch.position)
    return buffers["und"], self.velocity(buffers["gen"])
