"""Mini world: the whole method on two cores (docs/mini.md).

  irg mini run --out out/mini                                      every step, in order
  irg mini run --config configs/mini.py:quick --out out/quick      the same in ten minutes
  irg train --config configs/mini.py:base ...                      one of its trainings alone

The preset "world" holds the settings of `irg mini run`, which docs/settings.md lists. Three more
presets are its trainings for `irg train`, like `configs/irgl.py`, and differ in data and steps
only: "base" trains the stand-in for BAGEL, "irgl" trains it further in the two stages of the paper,
and "quality" trains it only on images better than its own (the ablation of the paper).

The preset "quick" is a run to try code with, not to measure an idea with: a smaller model, hardly
trained, on few prompts. Its trainings are "quick-base", "quick-irgl" and "quick-quality". Any
preset NAME of a run has trainings NAME-base, NAME-irgl and NAME-quality; "world" has no prefix.

The preset "world2" is a run in the second world, of more things with details: its texts are longer.
Its updates are fewer, so that each of its controls (`irg mini controls`) takes twenty minutes; its
"quality" has as many as both stages of "irgl". "world2-quick" is to it as "quick" is to "world".
"""

import dataclasses

from ml_collections import config_dict

from irg_jax import config as config_lib
from irg_jax import storage
from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from irg_jax.generate import settings as generate_settings
from irg_jax.images import ImageTransform
from irg_jax.mini.run import Settings
from irg_jax.messages import guess
from irg_jax.train.settings import TrainSettings, mixture

MODEL = ModelConfig(
    llm=LlmConfig(vocab_size=576, hidden_size=192, mlp_size=512, num_layers=6, num_heads=6,
                  num_kv_heads=3, rope_theta=300.0),
    vit=VitConfig(hidden_size=128, mlp_size=256, num_layers=2, num_heads=4, patch_size=16,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    max_latent_size=4,
)
QUICK_MODEL = dataclasses.replace(MODEL, llm=LlmConfig(
    vocab_size=576, hidden_size=128, mlp_size=384, num_layers=4, num_heads=4, num_kv_heads=2,
    rope_theta=300.0))
# The second world has more words, and four tokens a cell. Its longest conversations, of 1 in 100,
# have 500 tokens of text, 430 without an image in words; a reflection has at most 290, a prompt 45.
VOCABULARY2 = 640
_TRANSFORM = ImageTransform(max_size=64, min_size=64, stride=16)
# No guidance. In training one thought and image precede a reflection, never more: window 1.
GENERATE = generate_settings.Settings(
    rounds=2, height=64, width=64, steps=20, timestep_shift=1.0, think_limit=319,
    max_prompt_tokens=64, window=1,
    first=generate_settings.Guidance(text_scale=1.0, interval=(0.0, 1.0)),
    later=generate_settings.Guidance(text_scale=1.0, interval=(0.0, 1.0), renorm="text_channel"),
    forecast=generate_settings.Forecast(first=3), vae_transform=_TRANSFORM,
    vit_transform=_TRANSFORM)
GENERATE2 = dataclasses.replace(GENERATE, think_limit=399)


def get_config(preset: str = "irgl") -> config_dict.ConfigDict:
  # Of a training: steps of the two stages in a quick run; in the second world steps, tokens of text
  # in a row of each stage, and how it is made there.
  trainings = {
      "base": (_base, (240, 160), (1400, 1500), (512, 304), _base2),
      "irgl": (_irgl, (20, 60), (100, 800), (464, 464), _irgl2),
      "quality": (_quality, (20, 20), (200, 900), (464, 464), lambda: _quality(_irgl2))}
  presets = {"world": _world, "quick": _quick, "world2": _world2,
             "world2-quick": lambda: _second(_quick())}
  for name, (make, quick, second, texts, other) in trainings.items():
    presets |= {
        name: make, f"quick-{name}": lambda m=make, s=quick: _quickly(_updates(m(), s)),
        f"world2-{name}": lambda m=other, s=second, t=texts: _longer(_updates(m(), s), t),
        f"world2-quick-{name}": lambda m=other, s=quick, t=texts: _longer(
            _quickly(_updates(m(), s)), t)}
  if preset not in presets:
    raise ValueError(f"no preset {preset!r}{guess(preset, presets)}; known: {', '.join(presets)}")
  return presets[preset]()


def _world():
  return config_lib.to_config(Settings(model=MODEL, generate=GENERATE))


def _world2():
  config = _second(_world())
  config.vit_steps = 2500
  config.base_rows = 56000
  config.trajectories = 3000
  return config


def _quick():
  return config_lib.to_config(Settings(
      model=QUICK_MODEL, generate=dataclasses.replace(GENERATE, steps=10),
      autoencoder=str(storage.SHIPPED), base_rows=4000, trajectories=64, sample_batch=32,
      test_seen=20, test_unseen=12, test_images=1))


def _irgl():
  config = config_lib.to_config(TrainSettings(model=MODEL))
  config.data.workers = 0
  config.data.streams = 1
  config.data.rows = 8
  config.data.noise_samples = 2
  for transform in (config.data.vae_transform, config.data.vit_transform):
    transform.update(max_size=64, min_size=64, stride=16)
  for stage, steps in ((config.stage1, 500), (config.stage2, 4000)):
    stage.steps = steps
    stage.learning_rate = 1e-3
    stage.warmup_steps = 50
    stage.decay_steps = stage.steps // 2
  # Two of three rows of text alone are replayed ones (`datasets.replayed_rows`).
  config.stage1.mixture.initial_thinking_generation_learning = 1.5
  config.stage2.mixture.initial_thinking_generation_learning = 1.0
  config.stage1.sizes.update(und=480, gen=64, vit=48, text=440, samples=3)
  config.stage2.sizes.update(und=480, gen=80, vit=16, text=440, samples=3)
  config.optimizer.eps = 1e-8
  config.timestep_shift = 3.0  # towards noise: only there does the model need its plan
  config.keep = 2
  config.log_every = 20
  return config


def _irgl2():
  """The second world's: the image before is always seen, as nothing is guided without it."""
  config = _irgl()
  config.data.dropout.vae = 0.0
  config.data.noise_samples = 4
  config.stage2.mixture.improving_full_learning = 2.0
  for stage in (config.stage1, config.stage2):
    stage.sizes.update(gen=128)
  return config


def _base():
  config = _irgl()
  config.data.dropout.vae = 0.0
  config.data.noise_samples = 4
  config.data.rows = 12
  config.stage1.mixture = _mixture(initial_thinking_generation_learning=1.0)  # text alone
  config.stage1.sizes.update(und=352, gen=0, vit=0, text=304, samples=3)
  config.stage1.steps = 2300
  config.stage2.mixture = _mixture(initial_thinking_understanding_learning=0.2,
                                   initial_full_learning=0.8)
  # Attention over short rows is cheap.
  config.stage2.sizes.update(und=224, gen=128, vit=32, text=200, samples=3)
  config.stage2.steps = 1500
  for stage, rate in ((config.stage1, 1e-3), (config.stage2, 1.5e-3)):
    stage.learning_rate = rate
    stage.warmup_steps = 100
    stage.decay_steps = stage.steps // 4
  return config


def _base2():
  """The second world's: it describes more images, and changes given ones."""
  config = _base()
  config.stage2.mixture = _mixture(initial_thinking_understanding_learning=0.35,
                                   initial_full_learning=0.65)
  config.stage1.sizes.samples = 8  # some of its texts are short
  config.stage2.sizes.update(und=240, gen=160)
  return config


def _quality(make=_irgl):
  config = make()
  config.run_stages = "stage2"
  config.stage2.mixture = _mixture(initial_full_learning=1.0)
  config.stage2.steps = 200
  config.stage2.decay_steps = 100
  return config


def _updates(config, steps):
  """A training whose two stages have `steps` updates."""
  for stage, count in zip((config.stage1, config.stage2), steps):
    stage.update(steps=count, warmup_steps=min(stage.warmup_steps, count // 10),
                 decay_steps=stage.decay_steps * count // stage.steps)
  return config


def _quickly(config):
  """A training of the smaller model."""
  config.model = config_lib.to_config(QUICK_MODEL)
  config.data.rows = 6
  return config


def _second(config):
  """A run in the second world."""
  config.world = "2"
  config.altered_plans = 0.25
  if config.autoencoder:
    config.autoencoder = str(storage.SHIPPED.with_name("autoencoder2"))
  config.model.llm.vocab_size = VOCABULARY2
  config.generate = config_lib.to_config(GENERATE2)
  return config


def _longer(config, texts):
  """A training on the second world; `texts` are the tokens of text in a row of its two stages."""
  config.model.llm.vocab_size = VOCABULARY2
  for stage, text in zip((config.stage1, config.stage2), texts):
    stage.sizes.update(und=text + stage.sizes.und - stage.sizes.text, text=text)
  return config


def _mixture(**weights):
  return config_dict.ConfigDict(mixture(**weights))
