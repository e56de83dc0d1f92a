"""Sizes and numeric policy of the model, as frozen (hashable) dataclasses.

`configs/*.py` build these through `from_dict`; a checkpoint folder carries its own
(`irg_jax.weights.published.read_config`).
"""

import dataclasses
import math
import typing

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmConfig:
  """The decoder: Qwen2.5 shape, two experts a layer (spec section 2)."""

  vocab_size: int = 152064
  hidden_size: int = 3584
  mlp_size: int = 18944
  num_layers: int = 28
  num_heads: int = 28
  num_kv_heads: int = 4
  rope_theta: float = 1e6
  norm_eps: float = 1e-6

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
  """SigLIP NaViT. `num_layers` counts the layers that run (published count minus one)."""

  hidden_size: int = 1152
  mlp_size: int = 4304
  num_layers: int = 26
  num_heads: int = 16
  patch_size: int = 14
  grid_size: int = 70  # learned positions a side
  norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
  """FLUX.1 autoencoder. Latents are `scale_factor * (z - shift_factor)`."""

  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  z_channels: int = 16
  scale_factor: float = 0.3611
  shift_factor: float = 0.1159

  @property
  def downsample(self) -> int:
    return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Everything that fixes the parameters and the arithmetic.

  Attributes:
    max_latent_size: side of the latent token grid that has positions (64: 1024 pixels).
    latent_patch_size: side of the latent patch that makes one token.
    dtype: dtype of activations and matrix products, "float32" or "bfloat16". Norms,
      softmax, rotary angles, timesteps and velocities are float32 whatever this says.
    param_dtype: dtype of freshly initialised parameters.
    remat: what the backward pass recomputes: "none", "full", or the name of a policy in
      `jax.checkpoint_policies`.
  """

  llm: LlmConfig = LlmConfig()
  vit: VitConfig = VitConfig()
  vae: VaeConfig = VaeConfig()
  max_latent_size: int = 64
  latent_patch_size: int = 2
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"

  @property
  def latent_dim(self) -> int:
    """Numbers in one latent token."""
    return self.latent_patch_size**2 * self.vae.z_channels

  @property
  def pixel_stride(self) -> int:
    """Pixels a side that one latent token stands for."""
    return self.latent_patch_size * self.vae.downsample


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
  """Ids of the four control tokens, resolved by name from the tokenizer."""

  text_start: int = 151644  # <|im_start|>
  text_end: int = 151645  # <|im_end|>
  image_start: int = 151652  # <|vision_start|>
  image_end: int = 151653  # <|vision_end|>


def from_dict(config) -> ModelConfig:
  """Builds a ModelConfig from a mapping (for example an ml_collections ConfigDict).

  Args:
    config: mapping with the fields of ModelConfig; `llm`, `vit` and `vae` are mappings
      themselves. Fields that are missing keep their defaults.

  Raises:
    ValueError: a field that no config has, or sizes that make no model; names its path.
  """
  model = build(ModelConfig, config)
  _check_sizes(model)
  return model


def build(cls, fields, prefix: str = "", complete: bool = False):
  """A dataclass from a mapping with its fields; what is a dataclass itself, from one inside.

  Args:
    prefix: path of `fields` in the whole, with a dot at its end, for messages.
    complete: no field may be missing, even if it has a default.

  Raises:
    ValueError: a field is unknown, missing or not finite, or the class refuses its values; names
      its path.
  """
  kinds, values = typing.get_type_hints(cls), {}
  for name in fields:
    if name not in kinds:
      raise ValueError(f"config field {prefix + name!r} is unknown; known here: {sorted(kinds)}")
  for name in kinds if complete else ():
    if name not in fields:
      raise ValueError(f"config field {prefix + name!r} is missing")
  for name, value in fields.items():
    if dataclasses.is_dataclass(kinds[name]) and not dataclasses.is_dataclass(value):
      value = build(kinds[name], value, f"{prefix}{name}.", complete)
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
      raise ValueError(f"config field {prefix}{name} is {value}, but must be finite")
    values[name] = tuple(value) if isinstance(value, list) else value
  try:
    return cls(**values)
  except (TypeError, ValueError) as e:
    raise ValueError(f"config field {prefix.rstrip('.')!r}: {e}") from e


def to_dict(config: ModelConfig) -> dict:
  """The inverse of `from_dict`, in plain JSON types but for tuples."""
  return dataclasses.asdict(config)


def overrides(config: ModelConfig, prefix: str) -> list[str]:
  """All sizes as overrides of a configuration file: "`prefix`llm.num_layers=28", ..."""
  return [f"{prefix}{path}={value}" for path, value in _leaves(to_dict(config))]


def _check_sizes(model):
  llm, vit = model.llm, model.vit
  for path, value in _leaves(to_dict(model)):
    numbers = value if isinstance(value, tuple) else (value,)
    if any(type(n) is int and n < 1 for n in numbers):
      raise ValueError(f"model config field {path!r} is {value}, but must be at least 1")
  divides = {"llm.num_heads": (llm.num_heads, llm.hidden_size),
             "llm.num_kv_heads": (llm.num_kv_heads, llm.num_heads),
             "vit.num_heads": (vit.num_heads, vit.hidden_size)}
  for name, (part, whole) in divides.items():
    if whole % part:
      raise ValueError(f"model config field {name!r} is {part}, but must divide {whole}")
  if llm.hidden_size % 4 or llm.head_dim % 2:
    raise ValueError("model config field 'llm.hidden_size' must be a multiple of 4, and of twice "
                     f"the {llm.num_heads} heads, but is {llm.hidden_size}")
  for name in ("dtype", "param_dtype"):
    if getattr(model, name) not in DTYPES:
      raise ValueError(f"model config field {name!r} is {getattr(model, name)!r}, not one of "
                       f"{DTYPES}")


def _leaves(fields, prefix=""):
  for name, value in fields.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value
