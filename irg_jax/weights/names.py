"""Table of parameters: our path, published key, shape and layout of each.

Reading, checking, exporting and the abstract tree are derived from `rows`; a new parameter is a
new row. The model is in docs/spec.md, section 2, the conventions are in `Row`.
"""

import dataclasses
import functools
import re

import flax.traverse_util
import jax
import numpy as np

from irg_jax.config import ModelConfig, VaeConfig
from irg_jax.model.layers import SCALE

# The published name of a VAE layer is its path after these replacements.
_VAE_NAMES = ((r"(?<!mid/)(down|up|block)_", r"\1."), ("shortcut", "nin_shortcut"),
              ("attn_1/out", "attn_1/proj_out"), ("(down|up)sample", r"\1sample.conv"), ("/", "."))

TIMESTEP_FEATURES = 256
IMAGE_CHANNELS = 3


class CheckpointError(ValueError):
  """A checkpoint that is incomplete, damaged or of another model; names file, key and fix."""


def listing(names, limit: int = 4) -> str:
  """`a, b, c, d and 7 more`, sorted."""
  names = sorted(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def in_groups(items, size, limit) -> list[list]:
  """Cuts a list into groups whose sizes sum up to at most `limit`, or of one larger item."""
  groups, total = [[]], 0
  for item in items:
    if groups[-1] and total + size(item) > limit:
      groups, total = [*groups, []], 0
    groups[-1].append(item)
    total += size(item)
  return groups


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter.

  Attributes:
    path: in our tree, "transformer/..." or "vae/...".
    key: published name; "{layer}" is the layer's number where layers are stacked.
    layer_shape: our shape, without the layer axis.
    layers: length of the layer axis (axis 0 of ours); 0: there is none.
  """

  path: str
  key: str
  layer_shape: tuple[int, ...]
  layers: int = 0

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.layers,) * bool(self.layers) + self.layer_shape

  @property
  def axes(self) -> tuple[int, ...]:
    """Our axes in the order of the published array: torch keeps kernels as [out, in, ...]."""
    axes = tuple(range(len(self.layer_shape)))
    return (*axes[:-3:-1], *axes[:-2]) if self.path.endswith("/kernel") else axes

  @property
  def published_shape(self) -> tuple[int, ...]:
    return self.to_published_index(self.layer_shape)

  @property
  def keys(self) -> list[str]:
    """Published names, one a layer."""
    return [self.key.format(layer=i) for i in range(self.layers or 1)]

  @property
  def file(self) -> str:
    """Stem of the published file that the parameter is in."""
    return "ema" if self.path.startswith("transformer/") else "ae"

  @property
  def config_file(self) -> str:
    """Published file that the parameter's sizes follow from."""
    if self.file == "ae":
      return "ae_config.json"
    return "vit_config.json" if self.key.startswith("vit_model.") else "llm_config.json"

  def to_published(self, x: np.ndarray) -> np.ndarray:
    """One layer's array, ours -> published layout, as a view."""
    return x.transpose(self.axes)

  def to_published_index(self, index: tuple) -> tuple:
    """Index of one layer's array, ours -> published layout."""
    return tuple(index[i] for i in self.axes)


@functools.cache
def rows(config: ModelConfig) -> tuple[Row, ...]:
  """Every parameter of the model."""
  transformer = _token_rows(config) + _decoder_rows(config) + _vit_rows(config)
  return tuple(dataclasses.replace(row, path=f"{part}/{row.path}") for part, table in
               (("transformer", transformer), ("vae", _vae_rows(config.vae))) for row in table)


def may_be_int8(path: str) -> bool:
  """Whether a parameter is a matrix of the decoder's or the ViT's layers."""
  return re.fullmatch(r"transformer/(decoder|vit)/layers/.+/kernel", path) is not None


def scale_row(row: Row) -> Row:
  """The row of the scales of an int8 matrix, one for each output."""
  return dataclasses.replace(row, path=f"{row.path.removesuffix('kernel')}{SCALE}",
                             key=f"{row.key}_scale", layer_shape=row.layer_shape[-1:])


def stored_rows(leaves: dict, config: ModelConfig) -> tuple[Row, ...]:
  """`rows` and the scales of those of the leaves, {path: array}, that are int8."""
  is_int8 = lambda path: path in leaves and leaves[path].dtype == np.int8
  return rows(config) + tuple(
      scale_row(row) for row in rows(config) if may_be_int8(row.path) and is_int8(row.path))


def abstract_params(config: ModelConfig, dtype, weights: str | None = None) -> dict:
  """Shapes of all parameters: {"transformer": ..., "vae": ...} of `jax.ShapeDtypeStruct`.

  `weights` "int8": matrices of the layers are int8 with float32 scales.
  """
  leaves = {r.path: jax.ShapeDtypeStruct(r.shape, dtype) for r in rows(config)}
  for row in rows(config) if weights == "int8" else ():
    if may_be_int8(row.path):
      scales = scale_row(row)
      leaves |= {row.path: jax.ShapeDtypeStruct(row.shape, np.int8),
                 scales.path: jax.ShapeDtypeStruct(scales.shape, np.float32)}
  return unflatten(leaves)


def flatten(tree: dict) -> dict:
  """Nested dicts -> {path: leaf}."""
  return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: dict) -> dict:
  """The inverse of `flatten`."""
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def check_params(params: dict, config: ModelConfig, where: str = "params") -> dict:
  """Checks that a parameter tree fits `config`; returns {path: leaf}.

  Raises CheckpointError, which calls the tree `where`, if a parameter is missing, surplus, of
  another shape, or int8 and no matrix of a layer.
  """
  leaves = flatten(params)
  table = {r.path: r for r in stored_rows(leaves, config)}
  missing, surplus = table.keys() - leaves.keys(), leaves.keys() - table.keys()
  if missing or surplus:
    raise CheckpointError(
        f"{where}: not the parameters of this config; missing: {listing(missing) or 'none'}; "
        f"surplus: {listing(surplus) or 'none'}; use the config they were made with")
  for path, row in table.items():
    if tuple(leaves[path].shape) != row.shape:
      raise CheckpointError(f"{where}: {path} has shape {tuple(leaves[path].shape)}, the config "
                            f"wants {row.shape}; use the config they were made with")
    if leaves[path].dtype == np.int8 and not may_be_int8(path):
      raise CheckpointError(f"{where}: {path} is int8, which only matrices of layers may be; save "
                            "it as bfloat16")
  return leaves


def _layer(path, key, *shape, bias=True, layers=0, weight=None):
  """Weight and bias of a dense layer or a convolution or, with one axis, of a norm."""
  weight = weight or ("kernel" if len(shape) > 1 else "scale")
  kernel = Row(f"{path}/{weight}", f"{key}.weight", shape, layers)
  return [kernel] + bias * [Row(f"{path}/bias", f"{key}.bias", shape[-1:], layers)]


def _token_rows(config):
  """Embeddings of all kinds of tokens, and the heads."""
  llm, width = config.llm, config.llm.hidden_size
  return [
      *_layer("embed", "language_model.model.embed_tokens", llm.vocab_size, width, bias=False,
              weight="embedding"),
      *_layer("heads/text", "language_model.lm_head", width, llm.vocab_size, bias=False),
      *_layer("heads/velocity", "llm2vae", width, config.latent_dim),
      *_layer("latent_embed", "vae2llm", config.latent_dim, width),
      *_layer("time_embed/fc1", "time_embedder.mlp.0", TIMESTEP_FEATURES, width),
      *_layer("time_embed/fc2", "time_embedder.mlp.2", width, width),
      *_layer("connector/fc1", "connector.fc1", config.vit.hidden_size, width),
      *_layer("connector/fc2", "connector.fc2", width, width),
  ]


def _decoder_rows(config):
  """Both experts; published modules of the gen expert are those of und plus `_moe_gen`."""
  llm, table = config.llm, []
  biased = functools.partial(_layer, layers=llm.num_layers)
  plain = functools.partial(biased, bias=False)
  width, mlp, kv_width = llm.hidden_size, llm.mlp_size, llm.num_kv_heads * llm.head_dim
  for expert, gen in (("und", ""), ("gen", "_moe_gen")):
    to, root = f"decoder/layers/{expert}/", "language_model.model.layers.{layer}."
    attention, feed = root + "self_attn.", root + f"mlp{gen}."
    table += [
        *plain(to + "attn_norm", root + f"input_layernorm{gen}", width),
        *biased(to + "q", attention + f"q_proj{gen}", width, width),
        *biased(to + "k", attention + f"k_proj{gen}", width, kv_width),
        *biased(to + "v", attention + f"v_proj{gen}", width, kv_width),
        *plain(to + "o", attention + f"o_proj{gen}", width, width),
        *plain(to + "q_norm", attention + f"q_norm{gen}", llm.head_dim),
        *plain(to + "k_norm", attention + f"k_norm{gen}", llm.head_dim),
        *plain(to + "mlp_norm", root + f"post_attention_layernorm{gen}", width),
        *plain(to + "gate", feed + "gate_proj", width, mlp),
        *plain(to + "up", feed + "up_proj", width, mlp),
        *plain(to + "down", feed + "down_proj", mlp, width),
        *_layer(f"decoder/{expert}_norm", f"language_model.model.norm{gen}", width, bias=False),
    ]
  return table


def _vit_rows(config):
  vit, width, root = config.vit, config.vit.hidden_size, "vit_model.vision_model."
  stacked = functools.partial(_layer, layers=vit.num_layers)
  to, layer = "vit/layers/", root + "encoder.layers.{layer}."
  return [
      *_layer("vit/patch_embed", root + "embeddings.patch_embedding",
              vit.patch_size**2 * IMAGE_CHANNELS, width),
      *_layer("vit/position_embed", root + "embeddings.position_embedding", vit.grid_size**2,
              width, bias=False, weight="embedding"),
      *stacked(to + "norm1", layer + "layer_norm1", width),
      *stacked(to + "q", layer + "self_attn.q_proj", width, width),
      *stacked(to + "k", layer + "self_attn.k_proj", width, width),
      *stacked(to + "v", layer + "self_attn.v_proj", width, width),
      *stacked(to + "o", layer + "self_attn.out_proj", width, width),
      *stacked(to + "norm2", layer + "layer_norm2", width),
      *stacked(to + "fc1", layer + "mlp.fc1", width, vit.mlp_size),
      *stacked(to + "fc2", layer + "mlp.fc2", vit.mlp_size, width),
      *_layer("vit/post_norm", root + "post_layernorm", width),
  ]


def _vae_rows(vae: VaeConfig):
  widths = [vae.ch * mult for mult in vae.ch_mult]
  table = _vae_ends("encoder", IMAGE_CHANNELS, vae.ch, widths[-1], 2 * vae.z_channels)
  width = vae.ch
  for i, new in enumerate(widths):
    table += _stage(f"encoder/down_{i}", width, new, vae.num_res_blocks)
    width = new
    if i + 1 < len(widths):
      table += _vae_layer(f"encoder/down_{i}/downsample", 3, 3, new, new)
  table += _middle("encoder/mid", width) + _middle("decoder/mid", width)
  for i, new in reversed(list(enumerate(widths))):
    table += _stage(f"decoder/up_{i}", width, new, vae.num_res_blocks + 1)
    width = new
    if i:
      table += _vae_layer(f"decoder/up_{i}/upsample", 3, 3, new, new)
  return table + _vae_ends("decoder", vae.z_channels, widths[-1], width, IMAGE_CHANNELS)


def _vae_layer(path, *shape):
  key = path
  for ours, theirs in _VAE_NAMES:
    key = re.sub(ours, theirs, key)
  return _layer(path, key, *shape)


def _vae_ends(part, size_in, first, last, size_out):
  return [*_vae_layer(f"{part}/conv_in", 3, 3, size_in, first),
          *_vae_layer(f"{part}/norm_out", last),
          *_vae_layer(f"{part}/conv_out", 3, 3, last, size_out)]


def _stage(path, width, new, blocks):
  """Residual blocks of one resolution; the first one changes the width."""
  return [row for j in range(blocks)
          for row in _block(f"{path}/block_{j}", new if j else width, new)]


def _block(path, size_in, size_out):
  return [*_vae_layer(f"{path}/norm1", size_in),
          *_vae_layer(f"{path}/conv1", 3, 3, size_in, size_out),
          *_vae_layer(f"{path}/norm2", size_out),
          *_vae_layer(f"{path}/conv2", 3, 3, size_out, size_out),
          *(_vae_layer(f"{path}/shortcut", 1, 1, size_in, size_out)
            if size_in != size_out else [])]


def _middle(path, width):
  attention = [row for name in ("q", "k", "v", "out")
               for row in _vae_layer(f"{path}/attn_1/{name}", 1, 1, width, width)]
  return [*_block(f"{path}/block_1", width, width), *_vae_layer(f"{path}/attn_1/norm", width),
          *attention, *_block(f"{path}/block_2", width, width)]
