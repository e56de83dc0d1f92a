"""Table of parameters: our path, published key, shape and layout of each.

Reading, checking, exporting and the abstract tree are derived from `rows`; a new parameter is a
new row. The model is in docs/spec.md, section 2, the conventions are in `Row`.
"""

import dataclasses
import functools

import flax.traverse_util
import jax
import numpy as np

from irg_jax.config import ModelConfig, VaeConfig

# Axes of the published array in the order of ours: ours = published.transpose(layout).
_LINEAR = (1, 0)  # torch keeps [out, in]
_CONV = (2, 3, 1, 0)  # torch keeps [out, in, height, width]

TIMESTEP_FEATURES = 256
IMAGE_CHANNELS = 3


class CheckpointError(ValueError):
  """A checkpoint that is incomplete, damaged or of another model; names file, key and fix."""


def listing(names, limit: int = 4) -> str:
  """`a, b, c, d and 7 more`, sorted."""
  names = sorted(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter.

  Attributes:
    path: in our tree, "transformer/..." or "vae/...".
    key: published name; "{layer}" is the layer's number where layers are stacked.
    layer_shape: our shape, without the layer axis.
    layers: length of the layer axis (axis 0 of ours); 0: there is none.
    layout: axes of the published array in the order of ours.
  """

  path: str
  key: str
  layer_shape: tuple[int, ...]
  layers: int = 0
  layout: tuple[int, ...] = (0,)

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.layers,) * bool(self.layers) + self.layer_shape

  @property
  def published_shape(self) -> tuple[int, ...]:
    return tuple(self.layer_shape[i] for i in np.argsort(self.layout))

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
    return x.transpose(np.argsort(self.layout))

  def to_published_index(self, index: tuple) -> tuple:
    """Index of one layer's array, ours -> published layout."""
    return tuple(index[i] for i in np.argsort(self.layout))


@functools.cache
def rows(config: ModelConfig) -> tuple[Row, ...]:
  """Every parameter of the model."""
  transformer = _token_rows(config) + _decoder_rows(config) + _vit_rows(config)
  return tuple(_prefix(transformer, "transformer") + _prefix(_vae_rows(config.vae), "vae"))


def abstract_params(config: ModelConfig, dtype) -> dict:
  """Shapes of all parameters: {"transformer": ..., "vae": ...} of `jax.ShapeDtypeStruct`."""
  return unflatten({r.path: jax.ShapeDtypeStruct(r.shape, dtype) for r in rows(config)})


def flatten(tree: dict) -> dict:
  """Nested dicts -> {path: leaf}."""
  return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: dict) -> dict:
  """The inverse of `flatten`."""
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def check_params(params: dict, config: ModelConfig, where: str = "params") -> dict:
  """Checks that a parameter tree fits `config`; returns {path: leaf}.

  Args:
    where: name of the tree in messages, such as a file.

  Raises:
    CheckpointError: a parameter that is missing, surplus or of another shape.
  """
  leaves, table = flatten(params), {r.path: r for r in rows(config)}
  missing, surplus = table.keys() - leaves.keys(), leaves.keys() - table.keys()
  if missing or surplus:
    raise CheckpointError(
        f"{where}: not the parameters of this config; missing: {listing(missing) or 'none'}; "
        f"surplus: {listing(surplus) or 'none'}; use the config they were made with")
  for path, row in table.items():
    if tuple(leaves[path].shape) != row.shape:
      raise CheckpointError(f"{where}: {path} has shape {tuple(leaves[path].shape)}, the config "
                            f"wants {row.shape}; use the config they were made with")
  return leaves


def _prefix(table, part):
  return [dataclasses.replace(r, path=f"{part}/{r.path}") for r in table]


def _dense(path, key, size_in, size_out, bias=True, layers=0):
  kernel = Row(f"{path}/kernel", f"{key}.weight", (size_in, size_out), layers, _LINEAR)
  return [kernel] + bias * [Row(f"{path}/bias", f"{key}.bias", (size_out,), layers)]


def _conv(path, key, size_in, size_out, size=3):
  kernel = Row(f"{path}/kernel", f"{key}.weight", (size, size, size_in, size_out), 0, _CONV)
  return [kernel, Row(f"{path}/bias", f"{key}.bias", (size_out,))]


def _norm(path, key, width, bias=True, layers=0):
  scale = Row(f"{path}/scale", f"{key}.weight", (width,), layers)
  return [scale] + bias * [Row(f"{path}/bias", f"{key}.bias", (width,), layers)]


def _table(path, key, length, width):
  return [Row(f"{path}/embedding", f"{key}.weight", (length, width), 0, (0, 1))]


def _token_rows(config):
  """Embeddings of all kinds of tokens, and the heads."""
  llm, width = config.llm, config.llm.hidden_size
  return [
      *_table("embed", "language_model.model.embed_tokens", llm.vocab_size, width),
      *_dense("heads/text", "language_model.lm_head", width, llm.vocab_size, bias=False),
      *_dense("heads/velocity", "llm2vae", width, config.latent_dim),
      *_dense("latent_embed", "vae2llm", config.latent_dim, width),
      *_dense("time_embed/fc1", "time_embedder.mlp.0", TIMESTEP_FEATURES, width),
      *_dense("time_embed/fc2", "time_embedder.mlp.2", width, width),
      *_dense("connector/fc1", "connector.fc1", config.vit.hidden_size, width),
      *_dense("connector/fc2", "connector.fc2", width, width),
  ]


def _decoder_rows(config):
  """Both experts; published modules of the gen expert are those of und plus `_moe_gen`."""
  llm, table = config.llm, []
  dense = functools.partial(_dense, layers=llm.num_layers)
  norm = functools.partial(_norm, bias=False, layers=llm.num_layers)
  width, mlp, kv_width = llm.hidden_size, llm.mlp_size, llm.num_kv_heads * llm.head_dim
  for expert, gen in (("und", ""), ("gen", "_moe_gen")):
    to, root = f"decoder/layers/{expert}/", "language_model.model.layers.{layer}."
    attention, feed = root + "self_attn.", root + f"mlp{gen}."
    table += [
        *norm(to + "attn_norm", root + f"input_layernorm{gen}", width),
        *dense(to + "q", attention + f"q_proj{gen}", width, width),
        *dense(to + "k", attention + f"k_proj{gen}", width, kv_width),
        *dense(to + "v", attention + f"v_proj{gen}", width, kv_width),
        *dense(to + "o", attention + f"o_proj{gen}", width, width, bias=False),
        *norm(to + "q_norm", attention + f"q_norm{gen}", llm.head_dim),
        *norm(to + "k_norm", attention + f"k_norm{gen}", llm.head_dim),
        *norm(to + "mlp_norm", root + f"post_attention_layernorm{gen}", width),
        *dense(to + "gate", feed + "gate_proj", width, mlp, bias=False),
        *dense(to + "up", feed + "up_proj", width, mlp, bias=False),
        *dense(to + "down", feed + "down_proj", mlp, width, bias=False),
        *_norm(f"decoder/{expert}_norm", f"language_model.model.norm{gen}", width, bias=False),
    ]
  return table


def _vit_rows(config):
  vit, width, root = config.vit, config.vit.hidden_size, "vit_model.vision_model."
  dense = functools.partial(_dense, layers=vit.num_layers)
  norm = functools.partial(_norm, layers=vit.num_layers)
  to, layer = "vit/layers/", root + "encoder.layers.{layer}."
  patch = vit.patch_size**2 * IMAGE_CHANNELS
  names = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))
  attention = [dense(to + ours, layer + f"self_attn.{key}", width, width) for ours, key in names]
  return [
      *_dense("vit/patch_embed", root + "embeddings.patch_embedding", patch, width),
      *_table("vit/position_embed", root + "embeddings.position_embedding", vit.grid_size**2,
              width),
      *norm(to + "norm1", layer + "layer_norm1", width),
      *sum(attention, []),
      *norm(to + "norm2", layer + "layer_norm2", width),
      *dense(to + "fc1", layer + "mlp.fc1", width, vit.mlp_size),
      *dense(to + "fc2", layer + "mlp.fc2", vit.mlp_size, width),
      *_norm("vit/post_norm", root + "post_layernorm", width),
  ]


def _vae_rows(vae: VaeConfig):
  widths = [vae.ch * mult for mult in vae.ch_mult]
  table = _vae_ends("encoder", IMAGE_CHANNELS, vae.ch, widths[-1], 2 * vae.z_channels)
  width = vae.ch
  for i, new in enumerate(widths):
    table += _stage(f"encoder/down_{i}", f"encoder.down.{i}", width, new, vae.num_res_blocks)
    width = new
    if i + 1 < len(widths):
      table += _conv(f"encoder/down_{i}/downsample", f"encoder.down.{i}.downsample.conv", new, new)
  table += _middle("encoder", width) + _middle("decoder", width)
  for i, new in reversed(list(enumerate(widths))):
    table += _stage(f"decoder/up_{i}", f"decoder.up.{i}", width, new, vae.num_res_blocks + 1)
    width = new
    if i:
      table += _conv(f"decoder/up_{i}/upsample", f"decoder.up.{i}.upsample.conv", new, new)
  return table + _vae_ends("decoder", vae.z_channels, widths[-1], width, IMAGE_CHANNELS)


def _vae_ends(part, size_in, first, last, size_out):
  return [*_conv(f"{part}/conv_in", f"{part}.conv_in", size_in, first),
          *_norm(f"{part}/norm_out", f"{part}.norm_out", last),
          *_conv(f"{part}/conv_out", f"{part}.conv_out", last, size_out)]


def _stage(path, key, width, new, blocks):
  """Residual blocks of one resolution; the first one changes the width."""
  table = []
  for j in range(blocks):
    table += _block(f"{path}/block_{j}", f"{key}.block.{j}", new if j else width, new)
  return table


def _block(path, key, size_in, size_out):
  shortcut = _conv(f"{path}/shortcut", f"{key}.nin_shortcut", size_in, size_out, size=1)
  return [*_norm(f"{path}/norm1", f"{key}.norm1", size_in),
          *_conv(f"{path}/conv1", f"{key}.conv1", size_in, size_out),
          *_norm(f"{path}/norm2", f"{key}.norm2", size_out),
          *_conv(f"{path}/conv2", f"{key}.conv2", size_out, size_out),
          *(shortcut if size_in != size_out else [])]


def _middle(part, width):
  path, key = f"{part}/mid", f"{part}.mid"
  table = _norm(f"{path}/attn_1/norm", f"{key}.attn_1.norm", width)
  for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
    table += _conv(f"{path}/attn_1/{ours}", f"{key}.attn_1.{theirs}", width, width, size=1)
  return (_block(f"{path}/block_1", f"{key}.block_1", width, width) + table
          + _block(f"{path}/block_2", f"{key}.block_2", width, width))
