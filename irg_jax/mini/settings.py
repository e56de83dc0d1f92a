"""What a run of the mini world can be told; the values are in `configs/mini.py`."""

import dataclasses

from irg_jax import config as config_lib
from irg_jax import config_files
from irg_jax.config import ModelConfig
from irg_jax.generate.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniSettings:
  """One run of `irg mini run`.

  Attributes:
    config: the configuration file, whose other presets are the trainings.
    model: sizes.
    seed: of everything that is drawn at random.
    vae_steps, vae_batch, vae_learning_rate, vae_pictures: see `vae.train`.
    autoencoder: a checkpoint's folder whose autoencoder is used as it is; empty: trained anew.
    base_rows: rows that the base model learns from.
    trajectories: prompts that the base model draws for the data of the two stages.
    first_temperature: of the thoughts of those: higher than `generate` says, so that more of its
      images can be improved.
    sample_batch: prompts drawn side by side.
    train: further overrides of every training, "field=value".
    test_seen, test_unseen: prompts of the test, of combinations seen in training and not.
    test_pictures: images of a prompt of the test.
    generate: how all images are drawn.
  """

  config: str
  model: ModelConfig
  seed: int
  vae_steps: int
  vae_batch: int
  vae_learning_rate: float
  vae_pictures: int
  autoencoder: str
  base_rows: int
  trajectories: int
  first_temperature: float
  sample_batch: int
  train: tuple[str, ...]
  test_seen: int
  test_unseen: int
  test_pictures: int
  generate: Settings

  @property
  def first(self) -> Settings:
    """How the base model draws the first images of the trajectories."""
    return dataclasses.replace(self.generate, rounds=1, temperature=self.first_temperature)


def load(path, overrides=()) -> MiniSettings:
  """Reads the preset "world" of a configuration file like `configs/mini.py`.

  Raises:
    ValueError: see `config_files.load`; a field is unknown, missing or below 1.
  """
  config = config_files.load(path, ["preset=world", *overrides])
  fields = config.to_dict()
  fields.pop("preset")
  settings = config_lib.build(Settings, fields.pop("generate"), "generate.")
  model = config_lib.from_dict(fields.pop("model"))
  known = {f.name for f in dataclasses.fields(MiniSettings)} - {"config", "model", "generate"}
  if known != fields.keys():
    raise ValueError(f"config file {path}: the preset 'world' needs the fields {sorted(known)}, "
                     f"but has {sorted(fields)}")
  for name, value in fields.items():
    if isinstance(value, int) and value < (0 if name in ("seed", "test_unseen") else 1):
      raise ValueError(f"config field {name!r} is {value}, but must be at least 1")
  settings.validate(model)
  loaded = MiniSettings(config=str(path), model=model, generate=settings, **fields)
  loaded.first.validate(model)
  return loaded
