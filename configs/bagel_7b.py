"""BAGEL-7B-MoT: the sizes of the published checkpoint, activations in bfloat16.

14.1 billion parameters in the decoder with its embeddings, 7 billion of them active a token.
The sizes themselves are the defaults of `irg_jax.config`.
"""

from ml_collections import config_dict

from irg_jax import config as config_lib


def get_config() -> config_dict.ConfigDict:
  model = config_lib.ModelConfig(dtype="bfloat16")
  return config_dict.ConfigDict({"model": config_lib.to_config(model)})
