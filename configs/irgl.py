"""Recipe of IRG training on IRGL-300K: two stages, six modes (docs/spec.md, sections 3 to 6).

  irg train --config configs/irgl.py --data irgl --checkpoint weights/bagel-7b
  irg train --config configs/irgl.py:tiny
  irg train --config configs/irgl.py:tiny --config.run_stages=stage2

The preset "paper" (the default) trains BAGEL-7B-MoT on rows of 32768 and 36608 tokens. The preset
"tiny" trains the model of `configs/tiny.py` on the data of `irg data sample`: both stages take
minutes on a CPU. docs/settings.md lists every setting with the paper's value.
"""

import pathlib

from ml_collections import config_dict

from irg_jax import config as config_lib
from irg_jax.messages import guess
from irg_jax.train.settings import TrainSettings

CONFIGS = pathlib.Path(__file__).resolve().parent


def get_config(preset: str = "paper") -> config_dict.ConfigDict:
  config = config_lib.to_config(TrainSettings())
  if preset == "tiny":
    _tiny(config)
  elif preset != "paper":
    raise ValueError(f"no preset {preset!r}{guess(preset, ['tiny'])}; known: paper, tiny")
  return config


def _tiny(config):
  config.model = config_lib.to_config(config_lib.read_model(CONFIGS / "tiny.py"))
  config.random_weights = True
  config.data.path = "sample"  # made under --out
  config.data.workers = 0
  config.data.rows = 4
  config.data.bins = 4
  config.data.vae_transform.update(max_size=128, min_size=32)
  config.data.vit_transform.update(max_size=112, min_size=28)
  config.data.held_out = 0.2  # of 16 rows of each mode
  config.data.max_rejected = 0.1  # one row of each mode of that set is unusable on purpose
  for stage in (config.stage1, config.stage2):
    stage.steps = 40
    stage.learning_rate = 1e-3
    stage.sizes.update(und=768, gen=128, vit=128, text=512, samples=6)
  config.stage1.warmup_steps = 10
  config.checkpoint_every = 20
  config.eval_every = 20
  config.watch.prompts = str(CONFIGS / "watch_tiny.txt")
  config.watch.generate = str(CONFIGS / "generate_tiny.py")
  config.profile_at = 30  # the log says where the trace is
