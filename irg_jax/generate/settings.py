"""Settings of generation, and `generate.json`, the defaults that a checkpoint brings.

The settings' own defaults are the published two-round runs (docs/spec.md, section 7).
"""

import dataclasses
import difflib
import functools
import re

import jax

from irg_jax import config as config_lib
from irg_jax import storage
from irg_jax.config import ModelConfig, setting
from irg_jax.flow import RENORMS
from irg_jax.generate import stopping
from irg_jax.generate.context import LADDER
from irg_jax.generate.prompts import PromptForm, Reading, read, renewed
from irg_jax.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform
from irg_jax.storage import is_there, read_json, write_json

NAME = "generate.json"  # beside the weights

# Short names of settings that stand in a group.
SHORT = {"text_scale": ("first.text_scale", "later.text_scale"),
         "image_scale": ("later.image_scale",)}
_LONGEST = LADDER[-1] - 2  # tokens of a text, framed by its two ends

# Default of checkpoints without a system prompt of their own.
SYSTEM_PROMPT = """\
You turn a written request into a picture, and you always think before you draw.
Put every thought between <think> and </think>.
For the first picture, plan it in words: what the subject is and how many things there are, \
where each one stands and how the frame is composed, the style and medium, the light, the \
colours and textures, and any text that must be readable.
Once you have drawn, look closely at your picture and compare it with the request. In a new \
thought, name what falls short: wrong counts, colours, positions or shapes, missing parts, weak \
detail. Explain each improvement and why it matters, give step-by-step guidance for redrawing, \
and end with one comprehensive prompt that describes the better picture completely. Then draw \
again, keeping what was already right.
"""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["text_scale", "image_scale", "interval", "renorm_min"], meta_fields=["renorm"])
@dataclasses.dataclass(frozen=True)
class Guidance:
  """Guidance of one round (see `flow.guide`)."""

  text_scale: float = setting(
      4.0, "weight of the full context against the context without text; <= 1: no guidance")
  image_scale: float = setting(
      1.0, "weight of the full context against the context without images; <= 1: no guidance")
  interval: tuple[float, float] = setting(
      (0.4, 1.0), "guidance is on while interval[0] < t <= interval[1], t the shifted timestep")
  renorm: str = setting(
      "global", "guidance may not raise the norm: of the image, of a token, or of a token before "
      "image guidance", choices=RENORMS)
  renorm_min: float = setting(0.0, "lowest factor of that scaling", low=0, high=1)

  def faults(self):
    if len(self.interval) != 2 or self.interval[0] >= self.interval[1]:
      yield "interval", f"is {self.interval}, but must be two times, the lower one first"


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Updates of the flow without the decoder (see `forecast`)."""

  interval: int = setting(
      1, "the decoder runs in every so many updates; 1: in all", low=1, high=100)
  order: int = setting(2, "highest order of the differences in between", low=0, high=6)
  first: int = setting(5, "updates at the beginning in which it always runs", low=1)


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["temperature"], meta_fields=["top_k", "top_p"])
@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling of the next token. Temperatures share a compiled program."""

  temperature: float = 0.3
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """One run of interleaved generation."""

  rounds: int = setting(2, "images generated for each prompt, one a round", low=1, high=1000)
  until_satisfied: bool = setting(
      False, "`rounds` is the most: a reflection that finds nothing to improve keeps the image and "
      "ends them")
  height: int = setting(1024, "image height in pixels", low=1, high=2**16)
  width: int = setting(1024, "image width in pixels", low=1, high=2**16)
  steps: int = setting(
      50, "points of the flow schedule, so steps - 1 Euler updates", low=2, high=10_000)
  timestep_shift: float = setting(3.0, "warps the schedule towards noise; 1: none", above=0)
  think: bool = setting(True, "write a thought before each image")
  think_limit: int = setting(
      1000, "longest thought in tokens, its start token included (the paper's evaluations: 4096)",
      low=1, high=_LONGEST)
  temperature: float = setting(
      0.3, "sampling temperature of thoughts and answers; 0 is greedy", low=0)
  top_k: int = setting(0, "sample from the top_k likeliest tokens; 0: all", low=0, high=2**24)
  top_p: float = setting(
      1.0, "sample from the likeliest tokens that reach this probability together", above=0, high=1)
  first: Guidance = Guidance()
  later: Guidance = Guidance(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")
  forecast: Forecast = Forecast()
  window: int | None = setting(
      None, "earlier rounds that a round can see; not set: all that fit the cache", low=1,
      high=1000)
  max_prompt_tokens: int = setting(
      512, "longest prompt in tokens; decides the size of the cache", low=1, high=_LONGEST)
  cache_size: int | None = setting(
      None, "kv cache slots of a row; not set: as many as needed; fewer shorten the window",
      low=1, high=2**20)
  vae_transform: ImageTransform = VAE_TRANSFORM
  vit_transform: ImageTransform = VIT_TRANSFORM

  @property
  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p)

  def faults(self):
    if self.until_satisfied and self.rounds > 1 and not self.think:
      yield "until_satisfied", ("is true (--rounds auto), but without thinking no reflection can "
                                "end the rounds: set rounds to 1 or think to true")

  def validate(self, model: ModelConfig) -> None:
    """Raises ValueError that names a setting that is wrong, or wrong for a model."""
    config_lib.check(self)
    if self.rounds > 1 and not self.think:
      raise ValueError(f"config field 'rounds' is {self.rounds}, but without thinking the rounds "
                       "after the first read nothing new: set rounds to 1 or think to true")
    side, stride = model.max_latent_size * model.pixel_stride, model.pixel_stride
    for name, pixels in (("height", self.height), ("width", self.width)):
      if pixels % stride:
        raise ValueError(f"{name} {pixels} is not a positive multiple of {stride} pixels")
      if pixels > side:
        raise ValueError(f"{name} {pixels} is more than the {side} pixels this model has "
                         "positions for")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
  """Defaults of a checkpoint; the fields are those of `generate.json`, in its order."""

  system_prompt: str = SYSTEM_PROMPT  # read before every prompt
  settings: Settings = Settings()
  prompts: PromptForm = PromptForm()  # what it says of the prompts it was trained on
  satisfied: str = setting(
      "", "what a thought about an image contains if it finds nothing to improve; empty: unknown")
  dtype: str | None = setting(
      None, "dtype of the arithmetic; not set: that of the weights", choices=config_lib.DTYPES)

  def check(self, settings: Settings) -> None:
    """Raises ValueError where settings cannot work with the checkpoint."""
    stopping.check(settings, self.satisfied)

  def read(self, prompt: str, settings: Settings, edits: bool = False) -> Reading:
    """The prompt as the model reads it, with a note; `edits`: it is on images to edit."""
    return read(self.prompts, prompt, (settings.width, settings.height), edits)


def with_new(recorded: dict, now: dict) -> dict:
  """Recorded settings with `forecast` and `until_satisfied`; older runs had none.

  `now` are the settings of the command that would go on.
  """
  return {"forecast": now["forecast"] | {"interval": 1}, "until_satisfied": False} | recorded


def expand(changes: dict) -> dict:
  """Nested fields of `Settings` from changes that may have the short names of `SHORT`, or `size`.

  `size` is (width, height), or one number for both. `rounds` may be "auto" or "auto:N", see
  `stopping`. Scalars of NumPy become plain numbers.
  ValueError names a setting that is unknown.
  """
  known = [*(field.name for field in dataclasses.fields(Settings)), *SHORT, "size"]
  for name in changes:
    if name not in known:
      meant = difflib.get_close_matches(name, known, 1)
      raise ValueError(f"unknown setting {name!r}{f'; did you mean {meant[0]}?' if meant else ''} "
                       f"(known: {', '.join(known)})")
  fields = {}
  for name, value in sorted(changes.items(), key=lambda item: item[0] not in SHORT):
    if dataclasses.is_dataclass(value):
      value = dataclasses.asdict(value)
    if name == "size":
      sides = value if isinstance(value, (tuple, list)) else (value, value)
      if len(sides) != 2:
        raise ValueError(f"size is {value}, but must be (width, height), or one number for both")
      fields |= dict(zip(("width", "height"), sides))
    elif name == "rounds" and str(value).startswith("auto"):
      fields |= {"rounds": stopping.limit(value), "until_satisfied": True}
    elif name in SHORT:
      for group, field in (path.split(".") for path in SHORT[name]):
        fields.setdefault(group, {})[field] = value
    else:  # a group changes only what it names
      fields[name] = fields.get(name, {}) | value if isinstance(value, dict) else value
  return jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, fields)


def check_prompts(prompts) -> tuple[str, ...]:
  """The prompts without space around them; ValueError names one that is empty or no text."""
  if not prompts:
    raise ValueError("no prompt: give at least one")
  for number, prompt in enumerate(prompts, 1):
    if not isinstance(prompt, str):
      raise ValueError(f"prompt {number} is no text but a {type(prompt).__name__}: give a str")
    if not prompt.strip():
      raise ValueError(f"prompt {number} is empty: leave it out or write a description")
    if re.search("[\ud800-\udfff]", prompt):  # how Python keeps bytes that are not UTF-8
      raise ValueError(f"prompt {number} is not UTF-8 text: write it in UTF-8")
  return tuple(prompt.strip() for prompt in prompts)


def write_defaults(folder, defaults: Defaults) -> None:
  """Writes `generate.json` into a checkpoint folder."""
  write_json(storage.path(folder) / NAME, dataclasses.asdict(defaults), indent=1)


def read_defaults(folder, settings: Settings = Settings()) -> Defaults:
  """Reads `generate.json` of a checkpoint folder; without the file, defaults with `settings`.

  ValueError names a broken file.
  """
  path = storage.path(folder) / NAME
  if not is_there(path):
    return Defaults(settings=settings)
  try:
    fields = renewed(read_json(path))
    return config_lib.check(config_lib.update(Defaults(settings=settings), fields))
  except (ValueError, OSError) as e:
    raise ValueError(f"{path}: not settings of irg generate ({e}); mend it, or remove the file to "
                     "use the defaults") from e
