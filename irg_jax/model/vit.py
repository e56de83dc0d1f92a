"""SigLIP NaViT vision transformer on packed patches (docs/spec.md, section 2)."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from irg_jax.config import ModelConfig
from irg_jax.model.attention import KeyValues, attend, prepare
from irg_jax.model.layers import dense, scan_layers
from irg_jax.sharding import constrain, lookup
from irg_jax.tokens import FULL, Tokens


class VitLayer(nn.Module):
  """Pre-norm layer: attention within each image, then an MLP."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_RPD, tokens: Tokens, prepared):
    c, vit = self.config, self.config.vit
    h_RPD = layer_norm(c, "norm1")(x_RPD)
    q_RPNH, k_RPNH, v_RPNH = (
        constrain(rearrange(dense(c, vit.hidden_size, name=name)(h_RPD), "r p (n h) -> r p n h",
                            n=vit.num_heads), "batch", "length", "heads", None) for name in "qkv")
    keys = KeyValues(*(rearrange(x, "r p n h -> r n p h") for x in (k_RPNH, v_RPNH)), tokens)
    attended_RPNH = attend(q_RPNH, tokens, [keys], implementation=c.attention, prepared=prepared)
    x_RPD += dense(c, vit.hidden_size, name="o")(rearrange(attended_RPNH, "r p n h -> r p (n h)"))

    h_RPF = dense(c, vit.mlp_size, name="fc1")(layer_norm(c, "norm2")(x_RPD))
    h_RPF = constrain(nn.gelu(h_RPF, approximate=True), "batch", "length", "mlp")
    x_RPD += dense(c, vit.hidden_size, name="fc2")(h_RPF)
    return constrain(x_RPD, "batch", "length", "embed"), None


class Vit(nn.Module):
  """Vision transformer without the published last layer, with the published post-norm."""

  config: ModelConfig

  @nn.compact
  def __call__(self, patches_RPC, position_RP, image_RP):
    """Encodes patches of any number of images a row; attention stays within each image.

    Args:
      patches_RPC: float [R, P, patch * patch * 3], pixels in [-1, 1], flattened
        (row, column, channel).
      position_RP: int, `row * grid_size + column` of the patch in its image.
      image_RP: int, number of the image within the row; `tokens.PADDING` on padding.

    Returns:
      [R, P, ViT width] in the compute dtype.
    """
    c = self.config
    x_RPD = dense(c, c.vit.hidden_size, name="patch_embed")(patches_RPC)
    place = nn.Embed(c.vit.grid_size**2, c.vit.hidden_size, param_dtype=c.param_dtype,
                     name="position_embed")
    x_RPD += lookup(place.embedding, position_RP).astype(c.dtype)
    tokens, head_dim = patch_tokens(image_RP), c.vit.hidden_size // c.vit.num_heads
    prepared = prepare(tokens, [tokens], [len(image_RP)], 1, head_dim, c.attention)
    layers = scan_layers(VitLayer, c.vit.num_layers, c.remat, in_axes=(nn.broadcast,) * 2,
                         loop=False, config=c)
    x_RPD, _ = layers(constrain(x_RPD, "batch", "length", "embed"), tokens, prepared)
    return layer_norm(c, "post_norm")(x_RPD)


def patch_tokens(image_RP) -> Tokens:
  """Metadata of patches, given each patch's image: a patch sees all of its own image."""
  zeros_RP = jnp.zeros_like(image_RP)
  return Tokens(sample=image_RP, index=zeros_RP, split=zeros_RP, kind=zeros_RP + FULL)


def layer_norm(config: ModelConfig, name: str):
  """Layer norm over the last axis in the dtypes of the config."""
  return nn.LayerNorm(epsilon=config.vit.norm_eps, dtype=config.dtype,
                      param_dtype=config.param_dtype, name=name)
