"""The mini world: the whole method on two cores (docs/mini.md).

  irg mini run --out out/mini                                   every step, in order
  irg train --config configs/mini.py --config.preset=base ...   one of its trainings alone

The presets differ in their data and steps only: "base" makes the stand-in for BAGEL, "irgl"
trains it in the two stages of the paper, and "quality" only on images better than its own
(the ablation of the paper). All are read by `irg train` like `configs/irgl.py`.
"""

import pathlib

from ml_collections import config_dict

from irg_jax import config as config_lib
from irg_jax import config_files
from irg_jax.data.records import MODES

ROOT = pathlib.Path(__file__).resolve().parents[1]

MODEL = config_lib.ModelConfig(
    llm=config_lib.LlmConfig(
        vocab_size=576, hidden_size=192, mlp_size=512, num_layers=6, num_heads=6, num_kv_heads=3,
        rope_theta=300.0),
    vit=config_lib.VitConfig(
        hidden_size=128, mlp_size=256, num_layers=2, num_heads=4, patch_size=16, grid_size=4),
    vae=config_lib.VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    max_latent_size=4,
)


def get_config(preset: str = "irgl") -> config_dict.ConfigDict:
  presets = {"world": _world, "base": _base, "irgl": _irgl, "quality": _quality}
  if preset not in presets:
    raise ValueError(f"no preset {preset!r}; known: {', '.join(presets)}")
  config = presets[preset]()
  config.preset = preset
  return config


def _world():
  config = config_dict.ConfigDict()
  config.model = config_dict.ConfigDict(config_lib.to_dict(MODEL))
  config.seed = 0
  config.vae_steps = 16000
  config.vae_batch = 2
  config.vae_learning_rate = 1e-3
  config.vae_pictures = 6000
  config.autoencoder = ""  # or a checkpoint that has one: a fork that keeps it saves the training
  config.base_rows = 72000
  config.trajectories = 6000
  config.first_temperature = 1.0
  config.sample_batch = 64
  config.train = ()  # overrides of every training, "field=value"
  config.test_seen = 168
  config.test_unseen = 96
  config.test_pictures = 4
  # How the default model draws; what is not set is as in configs/generate.py.
  config.generate = _group(
      rounds=2, height=64, width=64, steps=20, timestep_shift=1.0, think_limit=319,
      temperature=0.3, max_prompt_tokens=64,
      window=1,  # training shows one thought and image before a reflection, never more
      first=_group(text_scale=1.0, image_scale=1.0, interval=(0.0, 1.0), renorm="global",
                   renorm_min=0.0),
      later=_group(text_scale=1.0, image_scale=1.0, interval=(0.0, 1.0), renorm="text_channel",
                   renorm_min=0.0),
      vae_transform=_group(max_size=64, min_size=64, stride=16),
      vit_transform=_group(max_size=64, min_size=64, stride=16))
  return config


def _irgl():
  config = config_files.load(ROOT / "configs" / "irgl.py")
  config.unlock()
  config.model = config_dict.ConfigDict(config_lib.to_dict(MODEL))
  config.data.workers = 0
  config.data.streams = 1
  config.data.rows = 8
  config.data.noise_draws = 2
  config.data.vae_transform = _group(max_size=64, min_size=64, stride=16)
  config.data.vit_transform = _group(max_size=64, min_size=64, stride=16)
  for stage, steps in ((config.stage1, 500), (config.stage2, 4000)):
    stage.steps = steps
    stage.learning_rate = 1e-3
    stage.warmup_steps = 50
    stage.decay_steps = stage.steps // 2
  # Two of three rows of words alone are replayed ones (`datasets.replayed_rows`).
  config.stage1.mixture.initial_thinking_generation_learning = 1.5
  config.stage2.mixture.initial_thinking_generation_learning = 1.0
  config.stage1.sizes = _group(und=480, gen=64, vit=48, text=440, samples=3)
  config.stage2.sizes = _group(und=480, gen=80, vit=16, text=440, samples=3)
  config.ema_decay = 0.995
  config.optimizer.eps = 1e-8
  config.timestep_shift = 3.0  # towards noise: only there must the plan be read
  config.checkpoint_every = 500
  config.keep = 2
  config.log_every = 20
  return config


def _base():
  config = _irgl()
  config.data.dropout.vae = 0.0
  config.data.noise_draws = 4
  config.data.rows = 12
  config.stage1.mixture = _mixture(initial_thinking_generation_learning=1.0)  # words alone
  config.stage1.sizes = _group(und=352, gen=0, vit=0, text=304, samples=3)
  config.stage1.steps = 2300
  config.stage2.mixture = _mixture(initial_thinking_understanding_learning=0.2,
                                   initial_full_learning=0.8)
  # Short rows: attention over them is cheap.
  config.stage2.sizes = _group(und=224, gen=128, vit=32, text=200, samples=3)
  config.stage2.steps = 1500
  for stage, rate in ((config.stage1, 1e-3), (config.stage2, 1.5e-3)):
    stage.learning_rate = rate
    stage.warmup_steps = 100
    stage.decay_steps = stage.steps // 4
  return config


def _quality():
  config = _irgl()
  config.run_stages = "stage2"
  config.stage2.mixture = _mixture(initial_full_learning=1.0)
  config.stage2.steps = 200
  config.stage2.decay_steps = 100
  return config


def _mixture(**weights):
  return _group(**dict.fromkeys(MODES, 0.0) | weights)


def _group(**fields):
  return config_dict.ConfigDict(fields)
