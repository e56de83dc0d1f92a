"""Settings of `irg generate`: a file to copy and change.

  irg generate "a fox" --checkpoint DIR --config configs/generate.py --config.rounds=3

The defaults are those of the published two-round runs (docs/spec.md, section 7), listed in
docs/settings.md. A file may set some of the fields only, as these lines would:

  config.rounds = 3
  config.later = dict(text_scale=2.0, interval=(0.1, 1.0))
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  return config
