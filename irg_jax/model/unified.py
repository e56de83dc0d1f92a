"""The unified transformer: everything that becomes a token, the decoder, the heads."""

import flax.linen as nn
import jax.numpy as jnp

from irg_jax.config import ModelConfig
from irg_jax.model.decoder import Decoder
from irg_jax.model.heads import Heads
from irg_jax.model.layers import sincos_2d, timestep_features
from irg_jax.model.vit import Vit
from irg_jax.sharding import lookup, pick


class TwoLayer(nn.Module):
  """Linear, activation, linear."""

  features: int
  activation: str
  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    dense = lambda name: nn.Dense(self.features, dtype=self.config.dtype,
                                  param_dtype=self.config.param_dtype, name=name)
    return dense("fc2")(getattr(nn, self.activation)(dense("fc1")(x)))


class UnifiedTransformer(nn.Module):
  """Embeddings, decoder and heads; used through `init` and `apply(..., method=...)`.

  Attributes:
    config: sizes and dtypes.
    attention: see `attention.attend`.
  """

  config: ModelConfig
  attention: str = "auto"

  def setup(self):
    c = self.config
    width = c.llm.hidden_size
    self.embed = nn.Embed(c.llm.vocab_size, width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.latent_embed = nn.Dense(width, dtype=c.dtype, param_dtype=c.param_dtype)
    self.time_embed = TwoLayer(width, "silu", c)
    self.vit = Vit(c, self.attention)
    self.connector = TwoLayer(width, "gelu", c)
    self.decoder = Decoder(c, self.attention)
    self.heads = Heads(c)

  def embed_text(self, ids):
    """Token ids [...] -> [..., D]."""
    rows = jnp.atleast_2d(ids)
    return lookup(self.embed.embedding, rows).astype(self.config.dtype).reshape(*ids.shape, -1)

  def embed_latents(self, latents, timestep, position):
    """Latent tokens with their flow time and place.

    Args:
      latents: float [..., P, latent_dim].
      timestep: float, broadcastable to [..., P]; 0 for clean images.
      position: int, broadcastable to [..., P]; `row * max_latent_size + column`.
    """
    width = self.config.llm.hidden_size
    time = self.time_embed(timestep_features(timestep))
    place = sincos_2d(position, self.config.max_latent_size, width).astype(self.config.dtype)
    return self.latent_embed(latents) + time + place

  def encode_vit(self, patches, position, image):
    """ViT hidden states, [R, P, vit width]; arguments as in `Vit`."""
    return self.vit(patches, position, image)

  def embed_vit(self, patches, position, image):
    """ViT tokens as the decoder sees them, [R, P, D]; arguments as in `Vit`."""
    place = sincos_2d(position, self.config.vit.grid_size, self.config.llm.hidden_size)
    return self.connector(self.vit(patches, position, image)) + place.astype(self.config.dtype)

  def decode(self, buffers, tokens, position, caches=()):
    """See `decoder.Decoder`."""
    return self.decoder(buffers, tokens, position, caches)

  def text_logits(self, und):
    """Next-token logits, float32 [..., vocab_size]."""
    return self.heads.text(und).astype(jnp.float32)

  def velocity(self, gen):
    """Flow velocity of latent tokens, float32 [..., latent_dim]."""
    return self.heads.velocity(gen).astype(jnp.float32)

  def __call__(self, batch, latents, timestep):
    """Training forward pass over packed rows.

    Args:
      batch: `data.batch.Batch`.
      latents: float [B, G, latent_dim], clean or noised as `timestep` says.
      timestep: float [B, G], flow time of each latent token, 0 where clean.

    Returns:
      (final hidden states of the und buffer [B, U, D], for `text_logits` where there is a
      loss; velocity float32 [B, G, latent_dim]).
    """
    und = self.embed_text(batch.text_ids)
    if batch.vit_patches.shape[1]:
      vit = self.embed_vit(batch.vit_patches, batch.vit_position, batch.vit_image)
      picked = pick(vit, jnp.maximum(batch.vit_index, 0))
      und = jnp.where((batch.vit_index >= 0)[..., None], picked, und)
    gen = self.embed_latents(latents, timestep, batch.latent_position)
    buffers, _ = self.decode({"und": und, "gen": gen}, batch.tokens, batch.position)
    return buffers["und"], self.velocity(buffers["gen"])
