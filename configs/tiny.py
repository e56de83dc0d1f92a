"""Model that initializes and runs in seconds on a CPU: tests, quick start, CI.

Its parameter tree is that of `bagel_7b.py`; only the sizes differ. Images have at most 128 pixels a
side, 8 latent tokens.

  irg init --config configs/tiny.py --out out/tiny
"""

from ml_collections import config_dict

from irg_jax import config as config_lib


def get_config() -> config_dict.ConfigDict:
  model = config_lib.ModelConfig(
      llm=config_lib.LlmConfig(
          vocab_size=320,  # 256 bytes, the four control tokens, and room to spare
          hidden_size=64,
          mlp_size=112,
          num_layers=2,
          num_heads=4,
          num_kv_heads=2,
      ),
      vit=config_lib.VitConfig(
          hidden_size=48, mlp_size=80, num_layers=2, num_heads=4, grid_size=8),
      vae=config_lib.VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
      max_latent_size=8,
  )
  return config_dict.ConfigDict({"model": config_lib.to_config(model)})
