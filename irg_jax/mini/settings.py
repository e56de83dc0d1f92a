"""Settings of `irg mini run`."""

import dataclasses

from irg_jax import config as config_lib
from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig, setting
from irg_jax.generate.settings import Guidance, Settings
from irg_jax.images import ImageTransform

MODEL = ModelConfig(
    llm=LlmConfig(vocab_size=576, hidden_size=192, mlp_size=512, num_layers=6, num_heads=6,
                  num_kv_heads=3, rope_theta=300.0),
    vit=VitConfig(hidden_size=128, mlp_size=256, num_layers=2, num_heads=4, patch_size=16,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    max_latent_size=4,
)

_TRANSFORM = ImageTransform(max_size=64, min_size=64, stride=16)

# No guidance. Training shows one thought and image before a reflection, never more: window 1.
GENERATE = Settings(
    rounds=2, height=64, width=64, steps=20, timestep_shift=1.0, think_limit=319,
    max_prompt_tokens=64, window=1,
    first=Guidance(text_scale=1.0, interval=(0.0, 1.0)),
    later=Guidance(text_scale=1.0, interval=(0.0, 1.0), renorm="text_channel"),
    vae_transform=_TRANSFORM, vit_transform=_TRANSFORM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniSettings:
  """One run of `irg mini run`.

  Attributes:
    config: the configuration file, whose other presets are the trainings.
  """

  config: str = ""
  model: ModelConfig = MODEL
  seed: int = setting(0, "of everything that is random", low=0)
  vae_steps: int = setting(16000, "updates of the autoencoder", low=1)
  vae_batch: int = setting(2, "images of an update of the autoencoder", low=1)
  vae_learning_rate: float = setting(1e-3, "peak learning rate of the autoencoder", above=0)
  vae_pictures: int = setting(
      6000, "different images that the autoencoder learns from", low=1)
  autoencoder: str = setting(
      "", "checkpoint folder whose autoencoder is used as it is; empty: one is trained")
  base_rows: int = setting(72000, "rows that the base model learns from", low=1)
  trajectories: int = setting(
      6000, "prompts that the base model draws for the data of the two stages", low=1)
  first_temperature: float = setting(
      1.0, "of the thoughts of those; high, so that more images can be improved", low=0)
  sample_batch: int = setting(64, "prompts drawn side by side", low=1)
  train: tuple[str, ...] = setting((), "overrides of every training, \"field=value\"")
  test_seen: int = setting(168, "test prompts of combinations seen in training", low=1)
  test_unseen: int = setting(96, "test prompts of combinations not seen in training", low=0)
  test_pictures: int = setting(4, "images of a test prompt", low=1)
  generate: Settings = GENERATE

  @property
  def first(self) -> Settings:
    """Settings of the first images of the trajectories, which the base model draws."""
    return dataclasses.replace(self.generate, rounds=1, temperature=self.first_temperature)


def load(path, overrides=()) -> MiniSettings:
  """Reads the preset "world" of a configuration file like `configs/mini.py`.

  Raises:
    ValueError: names the file or the field; see `config.read`.
  """
  settings = config_lib.read(MiniSettings(), f"{path}:world", overrides)
  settings.generate.validate(settings.model)
  settings.first.validate(settings.model)
  return dataclasses.replace(settings, config=str(path))
