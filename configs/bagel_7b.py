"""BAGEL-7B-MoT: sizes of the published checkpoint, activations in bfloat16.

The decoder has 14.1 billion parameters with its embeddings; 7 billion of them are active for each
token. The sizes are the defaults of `irg_jax.config`.
"""

from ml_collections import config_dict

from irg_jax import config as config_lib


def get_config() -> config_dict.ConfigDict:
  model = config_lib.ModelConfig(dtype="bfloat16")
  return config_dict.ConfigDict({"model": config_lib.to_config(model)})
