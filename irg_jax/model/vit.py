"""SigLIP NaViT: patches of any number of images packed in a row (spec section 2)."""

import flax.linen as nn
import jax.numpy as jnp

from irg_jax.config import ModelConfig
from irg_jax.model.attention import KeyValues, attend
from irg_jax.tokens import FULL, Tokens
from irg_jax.model.layers import scan_layers
from irg_jax.sharding import constrain, lookup


class VitLayer(nn.Module):
  config: ModelConfig
  attention: str

  @nn.compact
  def __call__(self, x_RPD, tokens: Tokens):
    c, vit = self.config, self.config.vit
    dense = lambda features, name: nn.Dense(
        features, dtype=c.dtype, param_dtype=c.param_dtype, name=name)
    norm = lambda name: layer_norm(c, name)
    heads = lambda x: x.reshape(*x.shape[:-1], vit.num_heads, -1)

    h = norm("norm1")(x_RPD)
    q, k, v = (constrain(heads(dense(vit.hidden_size, n)(h)), "batch", "length", "heads", None)
               for n in "qkv")
    keys = KeyValues(k.swapaxes(1, 2), v.swapaxes(1, 2), tokens)
    attended = attend(q, tokens, [keys], implementation=self.attention)
    x_RPD = x_RPD + dense(vit.hidden_size, "o")(attended.reshape(x_RPD.shape))

    h = nn.gelu(dense(vit.mlp_size, "fc1")(norm("norm2")(x_RPD)), approximate=True)
    h = constrain(h, "batch", "length", "mlp")
    return constrain(x_RPD + dense(vit.hidden_size, "fc2")(h), "batch", "length", "embed"), None


class Vit(nn.Module):
  """Vision transformer. The published last layer is dropped, the post-norm is kept."""

  config: ModelConfig
  attention: str = "auto"

  @nn.compact
  def __call__(self, patches_RPC, position_RP, image_RP):
    """Encodes patches; attention stays inside each image.

    Args:
      patches_RPC: float [R, P, patch * patch * 3], pixels in [-1, 1], flattened
        (row, column, channel).
      position_RP: int [R, P], `row * grid_size + column` of the patch in its image.
      image_RP: int [R, P], number of the image within the row, `attention.PADDING` where
        there is no patch.

    Returns:
      [R, P, width] in the compute dtype.
    """
    c = self.config
    x = nn.Dense(c.vit.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype,
                 name="patch_embed")(patches_RPC)
    place = nn.Embed(c.vit.grid_size**2, c.vit.hidden_size, param_dtype=c.param_dtype,
                     name="position_embed")
    x += lookup(place.embedding, position_RP).astype(c.dtype)
    tokens = patch_tokens(image_RP)
    layers = scan_layers(VitLayer, c.vit.num_layers, c.remat, in_axes=(nn.broadcast,),
                         config=c, attention=self.attention)
    x, _ = layers(constrain(x, "batch", "length", "embed"), tokens)
    return layer_norm(c, "post_norm")(x)


def patch_tokens(image) -> Tokens:
  """Metadata of patches of these images, int [..., P]: each sees all of its own image."""
  zeros = jnp.zeros_like(image)
  return Tokens(sample=image, index=zeros, split=zeros, kind=zeros + FULL)


def layer_norm(config: ModelConfig, name: str):
  return nn.LayerNorm(epsilon=config.vit.norm_eps, dtype=config.dtype,
                      param_dtype=config.param_dtype, name=name)
