"""The whole recipe of IRG training on IRGL-300K: two stages, six modes (spec sections 3 to 6).

  irg train --config configs/irgl.py --config.data.path=irgl --config.checkpoint=weights/bagel
  irg train --config configs/irgl.py --config.preset=tiny
  irg train --config configs/irgl.py --config.preset=tiny --config.run_stages=stage2

The preset "paper" is BAGEL-7B-MoT on rows of 32768 and 36608 tokens. The preset "tiny" has the
model of `configs/tiny.py` and goes through both stages in minutes on a CPU; its data are the
small set beside the reference vectors (environment variable IRG_REFERENCE), or
--config.data.path.
"""

import os
import pathlib

from ml_collections import config_dict

from irg_jax import config as config_lib
from irg_jax import config_files

ROOT = pathlib.Path(__file__).resolve().parents[1]


def get_config(preset: str = "paper") -> config_dict.ConfigDict:
  presets = {"paper": _paper, "tiny": _tiny}
  if preset not in presets:
    raise ValueError(f"no preset {preset!r}; known: {', '.join(presets)}")
  config = presets[preset]()
  config.preset = preset
  return config


def _paper():
  config = config_dict.ConfigDict()

  model = config_lib.ModelConfig(dtype="bfloat16", param_dtype="float32", remat="full")
  config.model = config_dict.ConfigDict(config_lib.to_dict(model))
  config.checkpoint = ""  # stage 1 starts from here; empty: random weights

  config.data = _data()
  config.stage1, config.stage2 = _stages()
  config.run_stages = "both"  # or "stage1" or "stage2" alone

  config.optimizer = _group(b1=0.9, b2=0.95, eps=1e-15, weight_decay=0.0, clip_norm=1.0)
  config.ema_decay = 0.995
  config.timestep_shift = 4.0
  config.ce_weight = 1.0
  config.mse_weight = 1.0

  config.mesh = _group(data=1, fsdp=0, sequence=1, tensor=1)  # 0: every device that is left
  config.checkpoint_every = 500
  config.keep = 3
  config.log_every = 10
  config.peak_tflops = 0.0  # of one device; 0: known by its name
  config.profile_at = 0  # a profiler trace from this step of each stage; 0: none
  config.profile_steps = 3
  config.seed = 0
  return config


def _data():
  data = config_dict.ConfigDict()
  data.path = ""
  data.streams = 0  # 0: one for each row
  data.workers = 8  # processes on each host
  data.rows = 64  # of a global batch
  data.accumulate = 1  # batches an update
  data.bins = 32  # rows that a stream fills at a time
  data.max_sample_tokens = 32768
  data.vae_transform = _group(max_size=1024, min_size=512, stride=16)
  data.vit_transform = _group(max_size=980, min_size=378, stride=14)
  data.dropout = _group(text=0.0, vit=0.0, vae=0.3)
  data.posterior = "sample"  # or "mean"
  data.noise_draws = 1
  data.ce_loss_reweighting = False
  data.max_rejected = 0.01
  return data


def _stages():
  # The two mixtures need their buffers in different proportions: stage 2 draws more than it reads.
  stage1 = _group(
      steps=2000,
      learning_rate=2e-5,  # constant after a linear warm-up
      warmup_steps=500,
      decay_steps=0,
      mixture=_group(
          initial_thinking_understanding_learning=0.5,
          initial_thinking_generation_learning=0.5,
          initial_full_learning=1.0,
          improving_thinking_understanding_learning=0.5,
          improving_thinking_generation_learning=0.5,
          improving_full_learning=1.0,
      ),
      sizes=_group(und=20480, gen=12288, vit=14720, text=4096, samples=16),
      freeze=_group(und=-1, gen=-1, vit=-1, llm=-1),  # from this step on; -1: never
      loss_off=_group(ce=-1, mse=-1),  # likewise
  )
  # Starts from the EMA of stage 1 with a fresh optimizer.
  stage2 = stage1.copy_and_resolve_references()
  stage2.steps = 30000
  stage2.warmup_steps = 0
  stage2.mixture = _group(
      initial_thinking_understanding_learning=0.0,
      initial_thinking_generation_learning=0.0,
      initial_full_learning=1.0,
      improving_thinking_understanding_learning=0.0,
      improving_thinking_generation_learning=0.0,
      improving_full_learning=1.0,
  )
  stage2.sizes = _group(und=16128, gen=20480, vit=9856, text=4096, samples=16)
  return stage1, stage2


def _tiny():
  config = _paper()
  config.model = config_files.load(ROOT / "configs" / "tiny.py").model
  reference = pathlib.Path(os.environ.get("IRG_REFERENCE", ROOT.parent / "shared" / "reference"))
  config.data.path = str(reference / "irgl_sample")
  config.data.workers = 0
  config.data.rows = 4
  config.data.bins = 4
  config.data.vae_transform = _group(max_size=128, min_size=32, stride=16)
  config.data.vit_transform = _group(max_size=112, min_size=28, stride=14)
  config.data.max_rejected = 0.6  # more than half of one mode of that set is unusable by intent
  for stage in (config.stage1, config.stage2):
    stage.steps = 40
    stage.learning_rate = 1e-3
    stage.sizes = _group(und=768, gen=128, vit=128, text=512, samples=6)
  config.stage1.warmup_steps = 10
  config.checkpoint_every = 20
  return config


def _group(**fields):
  return config_dict.ConfigDict(fields)
