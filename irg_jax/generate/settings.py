"""Settings of generation; the defaults are the published two-round runs (spec section 7)."""

import dataclasses
import functools

import jax

from irg_jax import config as config_lib
from irg_jax.config import ModelConfig, setting
from irg_jax.flow import RENORMS
from irg_jax.generate.context import LADDER
from irg_jax.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform

_LONGEST = LADDER[-1] - 2  # tokens of a text, framed by its two ends


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["text_scale", "image_scale", "interval", "renorm_min"], meta_fields=["renorm"])
@dataclasses.dataclass(frozen=True)
class Guidance:
  """How the velocities of several contexts are combined (see `flow.guide`)."""

  text_scale: float = setting(
      4.0, "weight of the full context against the one without text; <= 1 is no guidance")
  image_scale: float = setting(
      1.0, "weight against the context without images; <= 1 leaves it out")
  interval: tuple[float, float] = setting(
      (0.4, 1.0), "guidance is on while interval[0] < t <= interval[1], t the shifted timestep")
  renorm: str = setting("global", "what the guided velocity is rescaled over", choices=RENORMS)
  renorm_min: float = setting(0.0, "lower bound of the rescaling", low=0, high=1)

  def faults(self):
    if len(self.interval) != 2 or self.interval[0] >= self.interval[1]:
      yield "interval", f"is {self.interval}, but must be two times, the lower one first"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is sampled."""

  temperature: float = 0.3
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """One run of interleaved generation."""

  rounds: int = setting(2, "images of a prompt", low=1)
  height: int = setting(1024, "pixels of the images", low=1)
  width: int = setting(1024, "pixels of the images", low=1)
  steps: int = setting(50, "points of the flow schedule: steps - 1 Euler updates", low=2)
  timestep_shift: float = setting(3.0, "warps the schedule towards noise; 1: none", above=0)
  think: bool = setting(True, "write a thought before each image")
  think_limit: int = setting(
      1000, "tokens of a thought with its start token; 4096 in the paper's evaluations", low=1,
      high=_LONGEST)
  temperature: float = setting(0.3, "of thoughts and answers; 0 is greedy", low=0)
  top_k: int = setting(0, "sample from the k likeliest tokens; 0: all", low=0)
  top_p: float = setting(1.0, "sample from this share of the probability", above=0, high=1)
  first: Guidance = Guidance()
  later: Guidance = Guidance(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")
  window: int | None = setting(
      None, "earlier rounds that a round sees; not set: all that fit", low=1)
  max_prompt_tokens: int = setting(512, "longest prompt; sizes the cache", low=1, high=_LONGEST)
  cache_size: int | None = setting(
      None, "slots of the kv cache of a row; not set: as needed; too few shorten the window")
  vae_transform: ImageTransform = VAE_TRANSFORM
  vit_transform: ImageTransform = VIT_TRANSFORM

  @property
  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p)

  def validate(self, model: ModelConfig) -> None:
    """Raises ValueError that names the setting that a model cannot have."""
    config_lib.check(self)
    if self.rounds > 1 and not self.think:
      raise ValueError(f"config field 'rounds' is {self.rounds}, but without thinking nothing new "
                       "is said after the first: set rounds to 1 or think to true")
    side, stride = model.max_latent_size * model.pixel_stride, model.pixel_stride
    for name in ("height", "width"):
      pixels = getattr(self, name)
      if pixels % stride:
        raise ValueError(f"{name} {pixels} is not a positive multiple of {stride} pixels")
      if pixels > side:
        raise ValueError(f"{name} {pixels} is more than the {side} pixels this model has "
                         "positions for")
