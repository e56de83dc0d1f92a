"""Everything a run of generation can be told, with the defaults of spec section 7."""

import dataclasses
import functools
import math

import jax

from irg_jax.config import ModelConfig
from irg_jax.flow import RENORMS
from irg_jax.generate.context import LADDER
from irg_jax.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["text_scale", "image_scale", "interval", "renorm_min"], meta_fields=["renorm"])
@dataclasses.dataclass(frozen=True)
class Guidance:
  """How the velocities of several contexts are combined (see `flow.guide`).

  Attributes:
    text_scale: weight of the full context against `no_text`; <= 1 switches guidance off.
    image_scale: weight against `no_image`; <= 1 leaves the image out of guidance.
    interval: guidance is on while interval[0] < t <= interval[1], t the shifted flow time.
    renorm, renorm_min: see `flow.guide`.
  """

  text_scale: float = 4.0
  image_scale: float = 1.0
  interval: tuple[float, float] = (0.4, 1.0)
  renorm: str = "global"
  renorm_min: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: 0 is greedy.
    top_k: only the k likeliest tokens (and those as likely as the k-th); 0 is all.
    top_p: only the likeliest tokens that together reach this probability; 1 is all.
  """

  temperature: float = 0.3
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """One run of interleaved generation.

  Attributes:
    rounds: images drawn for each prompt.
    height, width: pixels of the images.
    steps: points of the flow schedule; `steps - 1` Euler updates.
    timestep_shift: see `flow.shift_time`.
    think: whether a thought is written before each image.
    think_limit: tokens of a thought, its start token counted (so at most one less is text).
    temperature, top_k, top_p: how thoughts and answers are drawn, see `Sampling`.
    first, later: guidance of the first and of all further rounds.
    window: how many earlier rounds a round sees at most; None for all that fit.
    max_prompt_tokens: longest prompt; decides the cache's size together with the above.
    cache_size: slots of the key-value cache for each row; None takes what is needed. If not
      all rounds fit, the window of rounds is shortened.
    vae_transform, vit_transform: sizes at which an image is encoded back.
  """

  rounds: int = 2
  height: int = 1024
  width: int = 1024
  steps: int = 50
  timestep_shift: float = 3.0
  think: bool = True
  think_limit: int = 1000
  temperature: float = 0.3
  top_k: int = 0
  top_p: float = 1.0
  first: Guidance = Guidance()
  later: Guidance = Guidance(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")
  window: int | None = None
  max_prompt_tokens: int = 512
  cache_size: int | None = None
  vae_transform: ImageTransform = VAE_TRANSFORM
  vit_transform: ImageTransform = VIT_TRANSFORM

  @property
  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p)

  def validate(self, config: ModelConfig) -> None:
    """Raises ValueError that names the setting if the settings make no sense for a model."""
    self.validate_texts()
    side, stride = config.max_latent_size * config.pixel_stride, config.pixel_stride
    for name in ("height", "width"):
      pixels = getattr(self, name)
      if pixels < stride or pixels % stride:
        raise ValueError(f"{name} {pixels} is not a positive multiple of {stride} pixels")
      if pixels > side:
        raise ValueError(f"{name} {pixels} is more than the {side} pixels this model has "
                         "positions for")
    self._check_bounds(rounds=(1, math.inf), steps=(2, math.inf))
    if self.window is not None and self.window < 1:
      raise ValueError(f"window is {self.window}, but a round must see at least 1 earlier round")
    if self.rounds > 1 and not self.think:
      raise ValueError(f"rounds is {self.rounds}, but without thinking nothing new is said "
                       "after the first: set rounds to 1 or think to true")
    if self.timestep_shift <= 0:
      raise ValueError(f"timestep_shift is {self.timestep_shift}, but must be above 0")
    for name in ("first", "later"):
      _check_guidance(name, getattr(self, name))

  def validate_texts(self) -> None:
    """As `validate`, of what texts alone depend on."""
    longest = LADDER[-1] - 2  # framed by its two ends
    self._check_bounds(think_limit=(1, longest), max_prompt_tokens=(1, longest))
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError("thoughts need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, but "
                       f"{self.sampling}")

  def _check_bounds(self, **bounds):
    for name, (low, high) in bounds.items():
      value = getattr(self, name)
      if not low <= value <= high:
        limit = f"at least {low}" if value < low else f"at most {high}"
        raise ValueError(f"{name} is {value}, but must be {limit}")


def _check_guidance(name, guidance):
  if guidance.renorm not in RENORMS:
    raise ValueError(f"{name}.renorm is {guidance.renorm!r}, not one of {RENORMS}")
  if not 0 <= guidance.renorm_min <= 1:
    raise ValueError(f"{name}.renorm_min is {guidance.renorm_min}, but must be from 0 to 1")
  if len(guidance.interval) != 2 or guidance.interval[0] >= guidance.interval[1]:
    raise ValueError(f"{name}.interval is {guidance.interval}, but must be two times, the lower "
                     "one first")
