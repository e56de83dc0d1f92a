"""Settings that fit the model of `configs/tiny.py`: small images, short thoughts.

Fields that are not set here keep their defaults.

  irg generate "a fox" --checkpoint out/tiny --config configs/generate_tiny.py
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.height = 64
  config.width = 64
  config.steps = 10
  config.think_limit = 48
  config.max_prompt_tokens = 256  # one token a byte: a long sentence
  config.vae_transform = config_dict.ConfigDict(dict(max_size=128, min_size=32, stride=16))
  config.vit_transform = config_dict.ConfigDict(dict(max_size=112, min_size=28, stride=14))
  return config
