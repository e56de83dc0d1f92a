"""How `irg generate` draws: the settings of the published two-round runs (spec section 7).

These are the defaults, written out to be copied and changed. Any field can be set on the
command line; a copy of this file may leave out the fields it does not change.

  irg generate "a fox" --checkpoint DIR --config configs/generate.py --config.rounds=3
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.rounds = 2
  config.window = config_dict.placeholder(int)  # earlier rounds a round sees; not set: all
  config.height = 1024
  config.width = 1024

  # The schedule: `steps` times from 1 to 0, warped towards noise, so steps - 1 updates.
  config.steps = 50
  config.timestep_shift = 3.0

  config.think = True
  config.think_limit = 1000  # tokens; the paper's evaluations allow 4096
  config.temperature = 0.3  # 0 takes the likeliest token
  config.top_k = 0  # 0: no limit
  config.top_p = 1.0

  # The first image: guided by text alone, for the noisy part of the schedule.
  config.first = config_dict.ConfigDict()
  config.first.text_scale = 4.0
  config.first.image_scale = 1.0
  config.first.interval = (0.4, 1.0)
  config.first.renorm = "global"
  config.first.renorm_min = 0.0

  # Every later one: guided by text and by the image before, throughout.
  config.later = config_dict.ConfigDict()
  config.later.text_scale = 4.0  # the paper's text says 2.0
  config.later.image_scale = 2.0
  config.later.interval = (0.0, 1.0)
  config.later.renorm = "text_channel"
  config.later.renorm_min = 0.0

  # The key-value cache: slots a row; not set: what the prompt and the rounds need.
  config.max_prompt_tokens = 512
  config.cache_size = config_dict.placeholder(int)

  # Sizes at which an image is looked at: long side at most, short side at least, multiple of.
  config.vae_transform = config_dict.ConfigDict(dict(max_size=1024, min_size=512, stride=16))
  config.vit_transform = config_dict.ConfigDict(dict(max_size=980, min_size=224, stride=14))
  return config
