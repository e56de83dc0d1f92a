"""Model of the speed benchmarks, float32, large enough that matrix products dominate.

Images are 256 x 256 pixels, 16 x 16 latent tokens. The ViT sees 252 x 252 pixels, 18 x 18 patches.

  python benchmarks/generate.py
"""

from ml_collections import config_dict

from irg_jax import config as config_lib


def get_config() -> config_dict.ConfigDict:
  model = config_lib.ModelConfig(
      llm=config_lib.LlmConfig(
          vocab_size=32000,
          hidden_size=512,
          mlp_size=1408,
          num_layers=8,
          num_heads=8,
          num_kv_heads=2,
      ),
      vit=config_lib.VitConfig(
          hidden_size=256, mlp_size=1024, num_layers=6, num_heads=4, grid_size=18),
      vae=config_lib.VaeConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=2),
      max_latent_size=16,
  )
  return config_dict.ConfigDict({"model": config_lib.to_config(model)})
