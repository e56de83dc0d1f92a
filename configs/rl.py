"""Learning from rewards on trajectories (docs/rl.md).

  irg rl --config configs/rl.py:mini
  irg rl --config configs/rl.py --checkpoint weights/irg-7b --prompts prompts.jsonl \
      --config.reward=judge --config.judge.url=http://localhost:8000/v1 --config.judge.model=NAME

The preset "large" (the default) is for a model of 7B: adapters, images of 512 pixels, and a judge.
The preset "mini" is for the model in the package: its own prompts, and the verifier. "mini2" is for
a model of the second mini world, whose thoughts are longer: --checkpoint out/mini2/checkpoint.
"""

from ml_collections import config_dict

from irg_jax import config as config_lib
from irg_jax.messages import guess
from irg_jax.rl.settings import RlSettings


def get_config(preset: str = "large") -> config_dict.ConfigDict:
  config = config_lib.to_config(RlSettings())
  presets = {"large": _large, "mini": _mini, "mini2": _mini2}
  if preset not in presets:
    raise ValueError(f"no preset {preset!r}{guess(preset, presets)}; known: {', '.join(presets)}")
  presets[preset](config)
  return config


def _large(config):
  config.batch = 16
  config.group = 16
  config.accumulate = 16
  config.lora.update(rank=64, alpha=128.0)
  config.learning_rate = 1e-4
  config.image.update(noise=1.3, window=2, among=7)
  config.text.divergence = 0.01
  config.image.divergence = 0.01
  config.rollout.update(height=512, width=512, steps=16)


def _mini(config):
  config.model.update(dtype="float32", remat="none")
  config.prompts = "mini"
  config.reward = "verifier"
  config.iterations = 20
  config.batch = 8
  config.group = 8
  config.learning_rate = 1e-4
  config.image.update(noise=0.7, window=2, among=7, clip=1e-3)
  config.rollout.batch_size = 64
  config.checkpoint_every = 5


def _mini2(config):
  _mini(config)
  config.prompts = "mini-2"
