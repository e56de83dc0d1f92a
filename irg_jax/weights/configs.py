"""Files beside the parameters: JSON configurations, tokenizer, and the fixed position tables.

The JSON files of a published checkpoint folder become a ModelConfig and are written back. Grid
sizes, which they lack, come from the shapes in the weights' headers. The two position tables are
stored beside the parameters, but the model computes the same numbers from positions: they are
checked on load, computed on export and never trained.
"""

import dataclasses
import json
import math
import pathlib

import einops
import ml_dtypes
import numpy as np

from irg_jax import storage
from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig, check, fault_of
from irg_jax.storage import write_json
from irg_jax.weights.names import CheckpointError
from irg_jax.weights.safetensors import Tensor, find_tensors, read_json

NAMES = ("llm_config.json", "vit_config.json", "ae_config.json")
# Files that are copied with a checkpoint: its tokenizer, and its settings of generation.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "special_tokens.json",
                   "generate.json")
TOLERANCE = 1e-5  # of float32 sines between libraries

# The published layer count includes the ViT's last layer, which is neither used nor stored.
DROPPED_VIT_LAYERS = 1

# Fields that other tools expect; the source folder's own values win.
_LABELS = {
    "llm_config.json": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "vit_config.json": {"model_type": "siglip_vision_model"},
}

# Published field -> ours.
_LLM = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "mlp_size",
        "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads", "rope_theta": "rope_theta",
        "rms_norm_eps": "norm_eps"}
_VIT = {"hidden_size": "hidden_size", "intermediate_size": "mlp_size",
        "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "patch_size": "patch_size", "layer_norm_eps": "norm_eps"}
_VAE = {name: name for name in (
    "ch", "num_res_blocks", "z_channels", "scale_factor", "shift_factor")}

# Fields with the only values that the model implements, the default first.
_LLM_FIXED = {"hidden_act": ("silu",), "tie_word_embeddings": (False,), "rope_scaling": (None,),
              "use_sliding_window": (False,), "attention_bias": (True,)}
_VIT_FIXED = {"hidden_act": ("gelu_pytorch_tanh", "gelu_tanh"), "num_channels": (3,),
              "rope": (False,)}
_VAE_FIXED = {"in_channels": (3,), "out_ch": (3,)}


class _Fields:
  """A JSON object whose fields are checked when they are read."""

  def __init__(self, path, fixed):
    self.path, self.content = path, read_json(path)
    for name, allowed in fixed.items():
      if self.content.get(name, allowed[0]) not in allowed:
        self.fail(name, f"only {' or '.join(map(json.dumps, allowed))} is supported")

  def fail(self, name, why):
    value = json.dumps(self.content.get(name))[:80]
    raise CheckpointError(f"{self.path}: {name} is {value}; {why}")

  def count(self, name, default=None) -> int:
    value = self.content.get(name, default)
    if type(value) is not int or not 1 <= value <= 2**24:
      self.fail(name, "expected a whole number from 1 to 2**24")
    return value

  def check_divides(self, name, width) -> None:
    if width % self.count(name):
      self.fail(name, f"it must divide {width}")

  def values(self, table, defaults, required=False) -> dict:
    """Values by our field; `required`: only numbers that are not whole may be missing."""
    values, bounds = {}, {field.name: field.metadata for field in dataclasses.fields(defaults)}
    for name, field in table.items():
      default = getattr(defaults, field)
      if isinstance(default, float):
        value = self.content.get(name, default)
        if type(value) not in (int, float) or not abs(value) < 1e38:  # as float32
          self.fail(name, "expected a number")
      else:
        value = self.count(name, None if required else default)
      if fault := fault_of(value, **bounds[field]):
        self.fail(name, fault.removeprefix("but "))
      values[field] = type(default)(value)
    return values


def read_config(folder, dtype: str = "float32") -> ModelConfig:
  """Reads the configuration of a published checkpoint folder; `dtype` as in `ModelConfig`.

  `ae_config.json` is needed only where the autoencoder is not FLUX.1's own. CheckpointError names
  a file that is missing, a field that the model does not implement, or sizes that contradict.
  """
  folder = storage.path(folder)
  llm, vit, vae = _read_llm(folder), _read_vit(folder), read_vae(folder)
  tensors = find_tensors(folder, "ema")
  return ModelConfig(
      llm=llm, vit=vit, vae=vae, dtype=dtype,
      max_latent_size=_side(tensors, "latent_pos_embed.pos_embed", 0),
      latent_patch_size=_side(tensors, "vae2llm.weight", 1, vae.z_channels))


def write_configs(folder: pathlib.Path, config: ModelConfig, source=None) -> None:
  """Writes the three files; further fields of `source`'s files are kept."""
  vit, vae = config.vit, config.vae
  published = lambda part, table: {name: getattr(part, field) for name, field in table.items()}
  contents = (
      {"hidden_act": "silu", "tie_word_embeddings": False} | published(config.llm, _LLM),
      {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3} | published(vit, _VIT)
      | {"num_hidden_layers": vit.num_layers + DROPPED_VIT_LAYERS,
         "image_size": vit.grid_size * vit.patch_size},
      {"in_channels": 3, "out_ch": 3, "downsample": vae.downsample, "ch_mult": list(vae.ch_mult)}
      | published(vae, _VAE))
  for name, ours in zip(NAMES, contents, strict=True):
    kept = storage.path(source) / name if source is not None else None
    theirs = _Fields(kept, {}).content if kept is not None and kept.is_file() else {}
    write_json(folder / name, _LABELS.get(name, {}) | theirs | ours)


def copy_tokenizer(source, folder: pathlib.Path) -> None:
  """Copies those of `TOKENIZER_FILES` that `source` has; nothing if `source` is None."""
  for name in TOKENIZER_FILES if source is not None else ():
    if storage.is_there(storage.path(source) / name):
      (folder / name).write_bytes(storage.read_file(storage.path(source) / name))


def table_grids(config: ModelConfig) -> dict[str, int]:
  """Published keys of the position tables and the side of their grid."""
  return {"latent_pos_embed.pos_embed": config.max_latent_size,
          "vit_pos_embed.pos_embed": config.vit.grid_size}


def sincos_table(width: int, grid: int) -> np.ndarray:
  """Fixed 2-D position table (docs/spec.md, section 2), float32 [grid * grid, width].

  Row-major over the grid. The first half of the width encodes the column, the second half the
  row; each half is sines, then cosines, of base 10000. Rounded once, from float64.
  """
  frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
  angle = np.multiply.outer(np.arange(grid, dtype=np.float64), frequency)
  line = np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)
  return np.concatenate([einops.repeat(line, "x d -> (y x) d", y=grid),
                         einops.repeat(line, "y d -> (y x) d", x=grid)], 1)


def check_table(tensor: Tensor, grid: int) -> None:
  """Raises CheckpointError if a stored position table is not the computed one, up to rounding."""
  want = sincos_table(tensor.shape[1], grid).astype(tensor.dtype).astype(np.float32)
  got = np.empty(tensor.shape, np.float32)
  tensor.read_into(got)
  within = np.abs(got - want) <= TOLERANCE + float(ml_dtypes.finfo(tensor.dtype).eps) * abs(want)
  if not within.all():
    row = int(np.argmin(within.all(axis=1)))
    raise CheckpointError(
        f"{tensor.path}: {tensor.key} is not the fixed sin-cos table of a {grid} x {grid} grid "
        f"(first at row {row}); this model computes the table and cannot use another one")


def _read_llm(folder):
  f = _Fields(folder / "llm_config.json", _LLM_FIXED)
  llm = LlmConfig(**f.values(_LLM, LlmConfig(), required=True))
  width, heads = llm.hidden_size, llm.num_heads
  if width % 4:
    f.fail("hidden_size", "the position tables need a multiple of 4")
  f.check_divides("num_attention_heads", width)
  if (width // heads) % 2:
    f.fail("num_attention_heads", f"{width} / {heads} must be even for rotary positions")
  if f.content.get("head_dim") not in (None, width // heads):
    f.fail("head_dim", f"only hidden_size / num_attention_heads = {width // heads} is supported")
  f.check_divides("num_key_value_heads", heads)
  return llm


def _read_vit(folder):
  f = _Fields(folder / "vit_config.json", _VIT_FIXED)
  vit = VitConfig(**f.values(_VIT, VitConfig(), required=True))
  if vit.num_layers <= DROPPED_VIT_LAYERS:
    f.fail("num_hidden_layers", "the last one is dropped, so there must be at least 2")
  if f.count("image_size") % vit.patch_size:
    f.fail("image_size", f"it must be a multiple of patch_size {vit.patch_size}")
  f.check_divides("num_attention_heads", vit.hidden_size)
  return dataclasses.replace(vit, num_layers=vit.num_layers - DROPPED_VIT_LAYERS,
                             grid_size=f.count("image_size") // vit.patch_size)


def read_vae(folder) -> VaeConfig:
  """Reads `ae_config.json`; FLUX.1's own sizes where it is missing. CheckpointError as above."""
  if not storage.is_there(folder / "ae_config.json"):
    return VaeConfig()
  f, flux = _Fields(folder / "ae_config.json", _VAE_FIXED), VaeConfig()
  mult = f.content.get("ch_mult", list(flux.ch_mult))
  if not isinstance(mult, list) or any(type(m) is not int for m in mult):
    f.fail("ch_mult", "expected a list of whole numbers of at least 1")
  fields = f.values(_VAE, flux)
  try:
    vae = check(VaeConfig(ch_mult=tuple(mult), **fields))
  except ValueError as e:
    raise CheckpointError(f"{f.path}: {e}") from e
  if f.count("downsample", vae.downsample) != vae.downsample:
    f.fail("downsample", f"ch_mult {mult} makes {vae.downsample}")
  return vae


def _side(tensors: dict[str, Tensor], key, axis, channels=1) -> int:
  """Side of the square grid along one axis of a matrix, of `channels` numbers a cell."""
  if key not in tensors:
    path = next(iter(tensors.values())).path if tensors else "the weights"
    raise CheckpointError(f"{path}: lacks {key}; the file is incomplete or of another model")
  shape, where = tensors[key].shape, f"{tensors[key].path}: {key}"
  if len(shape) != 2:
    raise CheckpointError(f"{where} has shape {shape}; expected two axes")
  cells, rest = divmod(shape[axis], channels)
  side = math.isqrt(cells)
  if rest or side * side != cells or not side:
    per = f" of {channels} channels (z_channels of ae_config.json)" if channels > 1 else ""
    raise CheckpointError(f"{where} has shape {shape}; axis {axis} must list a square grid{per}")
  return side
