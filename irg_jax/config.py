"""Declaration of settings as fields of frozen dataclasses; configuration files and overrides.

`rounds: int = setting(2, "images of a prompt", low=1)` declares default, documentation and bounds.
Validation (`build`, `check`), the ConfigDict that files and overrides change (`to_config`, `read`)
and the tables of docs/settings.md follow from it. A method `faults()` of a class checks several
fields together: it yields (name of the field, what is wrong with it).

A configuration file (`configs/*.py`) is Python with a function `get_config()` that returns an
`ml_collections.ConfigDict`. `FILE.py:PRESET` calls `get_config("PRESET")`. An override is
"field.path=value", on the command line `--config.field.path=value`.
"""

import dataclasses
import pathlib
import runpy
import sys
import types
import typing

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from irg_jax import storage
from irg_jax.messages import guess

DTYPES = ("float32", "bfloat16", "float16")
REQUIRED = dataclasses.MISSING  # the default of a setting without one


def setting(default, doc: str, *, low=None, high=None, above=None, choices=(), was: str = "",
            path: bool = False):
  """Declares a setting as a dataclass field; `doc` is one line for the tables of settings.

  Args:
    low, high, above: bounds, the last exclusive, of each item of a tuple and value of a dict.
    was: older name, accepted with a note for one version.
    path: the value is a path, see `storage.path`.
  """
  metadata = dict(doc=doc, low=low, high=high, above=above, choices=choices, was=was, path=path)
  how = {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
  return dataclasses.field(**how, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmConfig:
  """Decoder: Qwen2.5 with two experts in each layer (docs/spec.md, section 2)."""

  vocab_size: int = setting(152064, "rows of the token embedding", low=1, high=2**24)
  hidden_size: int = setting(3584, "width", low=1, high=2**17)
  mlp_size: int = setting(18944, "width inside the MLP", low=1, high=2**20)
  num_layers: int = setting(28, "layers", low=1, high=1000)
  num_heads: int = setting(28, "query heads", low=1)
  num_kv_heads: int = setting(4, "key and value heads", low=1)
  rope_theta: float = setting(1e6, "base of the rotary frequencies", low=1)
  norm_eps: float = setting(1e-6, "epsilon of RMSNorm", above=0, high=1)

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
  """SigLIP NaViT vision transformer (docs/spec.md, section 2)."""

  hidden_size: int = setting(1152, "width", low=1, high=2**17)
  mlp_size: int = setting(4304, "width inside the MLP", low=1, high=2**20)
  num_layers: int = setting(
      26, "layers that run, one fewer than in the published model", low=1, high=1000)
  num_heads: int = setting(16, "heads", low=1)
  patch_size: int = setting(14, "pixels along the side of a patch", low=1, high=1024)
  grid_size: int = setting(70, "learned positions along a side", low=1, high=1024)
  norm_eps: float = setting(1e-6, "epsilon of LayerNorm", above=0, high=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
  """FLUX.1 autoencoder. Latents are `scale_factor * (z - shift_factor)`."""

  ch: int = setting(128, "channels of the first level", low=1, high=2**14)
  ch_mult: tuple[int, ...] = setting(
      (1, 2, 4, 4), "multiple of `ch` at each level", low=1, high=1024)
  num_res_blocks: int = setting(2, "residual blocks of a level", low=1, high=100)
  z_channels: int = setting(16, "channels of a latent", low=1, high=2**14)
  scale_factor: float = setting(0.3611, "scale of the latents", low=1e-4, high=1e4)
  shift_factor: float = setting(
      0.1159, "shift of the latents, before the scale", low=-1e4, high=1e4)

  @property
  def downsample(self) -> int:
    return 2 ** (len(self.ch_mult) - 1)

  def faults(self):
    if not 1 <= len(self.ch_mult) <= 10:
      yield "ch_mult", f"has {len(self.ch_mult)} levels, but must have 1 to 10"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and numeric policy of the model.

  Norms, softmax, rotary angles, timesteps and velocities are float32 whatever `dtype` is.
  """

  llm: LlmConfig = LlmConfig()
  vit: VitConfig = VitConfig()
  vae: VaeConfig = VaeConfig()
  max_latent_size: int = setting(
      64, "latent tokens along the long side (64: 1024 px)", low=1, high=1024)
  latent_patch_size: int = setting(2, "latents along the side of a latent token", low=1, high=64)
  dtype: str = setting("float32", "dtype of activations and matrix products", choices=DTYPES)
  param_dtype: str = setting("float32", "dtype of new parameters", choices=DTYPES)
  attention: str = setting("auto", "form of attention, auto by platform and length of the row",
                           choices=("auto", "dense", "chunked", "kernel"))
  remat: str = setting("none", "recomputed in backward: none, full, "
                       "attention (all but its outputs) or a jax.checkpoint_policies")

  @property
  def latent_dim(self) -> int:
    """Channels of a latent token."""
    return self.latent_patch_size**2 * self.vae.z_channels

  @property
  def pixel_stride(self) -> int:
    """Pixels along the side of a latent token."""
    return self.latent_patch_size * self.vae.downsample

  def faults(self):
    llm, vit = self.llm, self.vit
    for name, part, whole in (("llm.num_heads", llm.num_heads, llm.hidden_size),
                              ("llm.num_kv_heads", llm.num_kv_heads, llm.num_heads),
                              ("vit.num_heads", vit.num_heads, vit.hidden_size)):
      if whole % part:
        yield name, f"is {part}, but must divide {whole}"
    if llm.hidden_size % 4 or llm.head_dim % 2:
      yield "llm.hidden_size", (f"must be a multiple of 4, and of twice the {llm.num_heads} "
                                f"heads, but is {llm.hidden_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
  """Ids of the four control tokens, resolved by name from the tokenizer."""

  text_start: int = 151644  # <|im_start|>
  text_end: int = 151645  # <|im_end|>
  image_start: int = 151652  # <|vision_start|>
  image_end: int = 151653  # <|vision_end|>


def build(cls, fields):
  """Settings of class `cls` from a mapping; ValueError names a field that is unknown or wrong."""
  return check(update(cls(), fields))


def update(settings, fields, prefix: str = ""):
  """A copy of `settings` with the fields of a mapping, whose types are checked, not the bounds.

  `prefix` is the dotted path of the group in messages.
  """
  kinds, values = typing.get_type_hints(type(settings)), {}
  for name, value in fields.items():
    name = _present(type(settings), name)
    if name not in kinds:
      raise ValueError(f"config field {prefix + name!r} is unknown{guess(name, kinds)}; known: "
                       f"{', '.join(kinds)}")
    values[name] = _updated(prefix + name, getattr(settings, name), value, kinds[name])
  try:
    return dataclasses.replace(settings, **values)
  except ValueError as e:
    raise ValueError(f"config field {prefix.rstrip('.')!r}: {e}") from e


def check(settings, prefix: str = ""):
  """Returns the settings, or raises ValueError that names the first one with a wrong value."""
  for field in dataclasses.fields(settings):
    name, value = prefix + field.name, getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      check(value, name + ".")
    for key, item in value.items() if isinstance(value, dict) else [("", value)]:
      if fault := fault_of(item, **field.metadata):
        raise ValueError(f"config field {f'{name}.{key}'.rstrip('.')!r} is {_shown(item)}, {fault}")
    try:
      field.metadata.get("path") and storage.path(value)
    except ValueError as e:
      raise ValueError(f"config field {name!r} is {e}") from e
  for name, fault in getattr(settings, "faults", tuple)():
    raise ValueError(f"config field {prefix + name!r} {fault}")
  return settings


def renamed(cls, prefix: str = "") -> dict[str, str]:
  """Maps the dotted names of older versions to the present ones."""
  names = {}
  for field in dataclasses.fields(cls):
    if field.metadata.get("was"):
      names[prefix + field.metadata["was"]] = prefix + field.name
    if dataclasses.is_dataclass(field.type):
      names |= renamed(field.type, f"{prefix}{field.name}.")
  return names


def to_config(settings) -> ConfigDict:
  """Converts settings to a ConfigDict; a field that may be None keeps its type."""
  config, kinds = ConfigDict(), typing.get_type_hints(type(settings))
  for field in dataclasses.fields(settings):
    name, value = field.name, getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      value = to_config(value)
    if isinstance(kinds[name], types.UnionType):
      config[name] = config_dict.placeholder(typing.get_args(kinds[name])[0])
    if value is not None:
      config[name] = ConfigDict(value) if isinstance(value, dict) else value
  return config


def read(default, path=None, overrides=()):
  """Reads settings: `default`, changed by the file at `path`, then by `overrides` in order.

  A file may set only some of the fields. Raises ValueError that names the file or the field.
  """
  if path is not None:
    config, overrides = _run(path, overrides)
    try:
      default = update(default, config.to_dict())
    except ValueError as e:
      raise ValueError(f"config file {path}: {e}") from e
  overrides = [_present(type(default), text) for text in overrides]
  return check(update(default, _override(to_config(default), overrides).to_dict()))


def load(path, overrides=()) -> ConfigDict:
  """Runs a configuration file ("FILE.py" or "FILE.py:PRESET"); applies overrides; locks it."""
  return _override(*_run(path, overrides))


def read_model(path, overrides=()) -> ModelConfig:
  """Reads the field `model` of any configuration file; overrides are "model.FIELD=VALUE"."""
  config = load(path, overrides)
  if "model" not in config:
    raise ValueError(f"config file {path}: has no field 'model'")
  return build(ModelConfig, config.model)


def locate(path, overrides=()) -> tuple[pathlib.Path, str, list[str]]:
  """Returns (file, preset or "", other overrides); the override "preset=NAME" is an older form."""
  file, _, preset = str(path).partition(".py:")
  file = f"{file}.py" if preset else str(path)
  for text in overrides:
    if text.startswith("preset="):
      preset = text.removeprefix("preset=")
      _note(f"--config.{text}", f"--config {file}:{preset}")
  return pathlib.Path(file), preset, [o for o in overrides if not o.startswith("preset=")]


def _override(config, overrides):
  for text in overrides:
    _check_field(config, *text.partition("=")[:2])
  # FlagValues of its own: neither absl's global flags nor sys.argv take part.
  values, argv = flags.FlagValues(), ["irg", *(f"--config.{text}" for text in overrides)]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, KeyError, AttributeError, TypeError, ValueError, SyntaxError) as e:
    raise ValueError(str(e).removeprefix("flag ")) from e
  return values.config


def _check_field(config, field, equals):
  """Names the wrong part of an override's path, which config_flags would not."""
  if not equals:
    raise ValueError(f"--config.{field}: write it as --config.{field}=VALUE")
  node, path = config, field.split(".")
  for i, name in enumerate(path):
    known = list(node) if isinstance(node, ConfigDict) else []
    if name not in known:
      where = ".".join(path[:i]) or "the configuration"
      raise ValueError(f"--config.{field}: no field {name!r} in {where}{guess(name, known)}; its "
                       f"fields: {', '.join(known) or 'none'}")
    node = node[name]
  if isinstance(node, ConfigDict):
    fields = ", ".join(f"--config.{field}.{name}" for name in node)
    raise ValueError(f"--config.{field} is a group of fields; set one of them: {fields}")


def _run(path, overrides):
  """Returns the ConfigDict of a file, and the overrides that are left."""
  file, preset, overrides = locate(path, overrides)
  if not file.is_file():
    raise ValueError(f"config file {file}: no such file{guess(file, file.parent.glob('*.py'))}")
  try:
    get_config = runpy.run_path(str(file)).get("get_config")
    config = get_config and get_config(*[preset] if preset else [])
  except Exception as e:  # any error of the file's own code
    raise ValueError(f"config file {file}: {type(e).__name__}: {e}") from e
  if not isinstance(config, ConfigDict):
    what = (f"get_config() returned a {type(config).__name__}, not an ml_collections.ConfigDict"
            if get_config else "has no function get_config()")
    raise ValueError(f"config file {file}: {what}")
  return config, overrides


def _updated(name, old, value, kind):
  """The new value of a setting, from that of a file or JSON object."""
  if dataclasses.is_dataclass(old) or isinstance(old, dict):
    if not hasattr(value, "items"):
      raise ValueError(f"config field {name!r} is {_shown(value)}, but must be a group of fields")
    if dataclasses.is_dataclass(old):
      return update(old, value, f"{name}.")
    if unknown := [key for key in value if key not in old]:
      raise ValueError(f"config field {name!r} has no {unknown[0]!r}; known: {', '.join(old)}")
    return old | {key: _updated(f"{name}.{key}", 0.0, x, float) for key, x in value.items()}
  is_tuple = typing.get_origin(kind) is tuple
  accepted = typing.get_args(kind) or (kind,)  # of `int | None`, `tuple[float, ...]`, `int`
  wanted = f"hold {accepted[0].__name__} values" if is_tuple else f"be {accepted[0].__name__}"
  accepted += (int,) if float in accepted else ()
  items = value if is_tuple and isinstance(value, (list, tuple)) else [value]
  if is_tuple and items is not value or not all(type(x) in accepted for x in items):
    raise ValueError(f"config field {name!r} is {_shown(value)}, but must {wanted}")
  if float in accepted:  # as the command line reads "2"
    items = [float(x) if type(x) is int and abs(x) <= 2**32 else x for x in items]
  return tuple(items) if is_tuple else items[0]


def fault_of(value, low=None, high=None, above=None, choices=(), **_):
  """Describes a wrong value of a setting, whose metadata are the arguments; None if it is right."""
  items = value if isinstance(value, tuple) else () if value is None else (value,)
  return next((fault for x in items for found, fault in (
      (isinstance(x, float) and not abs(x) < 1e38, "but must be finite, in float32 too"),
      (isinstance(x, int) and abs(x) > 2**32, "but must be a number of 32 bits"),
      (choices and x not in choices, f"not one of {choices}"),
      (low is not None and x < low, f"but must be at least {low}"),
      (high is not None and x > high, f"but must be at most {high}"),
      (above is not None and x <= above, f"but must be above {above}")) if found), None)


def _shown(value):
  return repr(value)[:80]


def _present(cls, text):
  """Replaces an older name in "field" or "field=value" by the present one, with a note."""
  field, equals, value = text.partition("=")
  new = renamed(cls).get(field, field)
  if new != field:
    _note(f"config field {field!r}", repr(new))
  return new + equals + value


def _note(old, new):
  print(f"note: {old} is now {new}; the old form will go in the next version", file=sys.stderr)
