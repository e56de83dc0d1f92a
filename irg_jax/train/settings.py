"""Settings of `irg train`: the recipe of IRG on IRGL-300K (docs/spec.md, sections 3 to 6).

The defaults are the recipe of the paper. `configs/irgl.py` names its presets.
"""

import dataclasses

from irg_jax import config as config_lib
from irg_jax.config import ModelConfig, setting
from irg_jax.data.batch import BufferSizes, DataSettings
from irg_jax.data.records import MODES
from irg_jax.weights import lora
from irg_jax.weights.lora import LoraSettings

STAGES = ("stage1", "stage2")

# Settings of older versions that are gone. Records of runs may still have them.
GONE = ("preset", "ce_weight", "mse_weight", "optimizer.b1", "optimizer.b2", "peak_tflops",
        "profile_steps")
# Defaults of settings that records of older versions lack.
ADDED = {"data.held_out": 0.0}


def mixture(**weights) -> dict[str, float]:
  """Weights of all modes by name; those not given have weight 0."""
  return dict.fromkeys(MODES, 0.0) | weights


def _since(what: str):
  return setting(-1, f"step from which {what}; -1: never", low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Freeze:
  """Step of the stage from which a part is not trained; -1: never."""

  und: int = _since("the und experts are frozen")
  gen: int = _since("the gen experts are frozen")
  vit: int = _since("the ViT is frozen, without its connector")
  llm: int = _since("experts, embedding and text head are frozen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOff:
  """Step of the stage from which a loss is measured, but not trained on; -1: never."""

  ce: int = _since("the text loss is measured but not trained on")
  mse: int = _since("the image loss is measured but not trained on")


@dataclasses.dataclass(frozen=True)
class Switches:
  """Static arguments of the train step that change during a stage: one compilation each."""

  frozen: tuple[str, ...] = ()  # names of `Freeze`
  losses: tuple[str, ...] = ("ce", "mse")  # those trained on


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
  """One stage; the defaults are those of stage 1."""

  steps: int = setting(2000, "updates", low=1)
  learning_rate: float = setting(2e-5, "learning rate, constant between warm-up and decay", low=0)
  warmup_steps: int = setting(500, "steps of the linear warm-up from 0", low=0)
  decay_steps: int = setting(0, "last steps, with a linear decay to 0", low=0)
  mixture: dict[str, float] = setting(
      {mode: 1.0 if mode.endswith("full_learning") else 0.5 for mode in MODES},
      "weight of the mode in the data; 0: none", low=0)
  sizes: BufferSizes = BufferSizes(und=20480, gen=12288, vit=14720, text=4096, samples=16)
  freeze: Freeze = Freeze()
  loss_off: LossOff = LossOff()

  def switches(self, step: int) -> Switches:
    """The parts and losses trained in the update after `step` updates of the stage."""
    begun = lambda group: tuple(name for name, since in dataclasses.asdict(group).items()
                                if 0 <= since <= step)
    off = begun(self.loss_off)
    return Switches(frozen=begun(self.freeze),
                    losses=tuple(name for name in ("ce", "mse") if name not in off))


# Stage 2 trains on more target images than it reads: other proportions of the buffers.
STAGE2 = StageSettings(
    steps=30000, warmup_steps=0,
    mixture=mixture(initial_full_learning=1.0, improving_full_learning=1.0),
    sizes=BufferSizes(und=16128, gen=20480, vit=9856, text=4096, samples=16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
  """AdamW after clipping by the global norm; its betas are 0.9 and 0.95."""

  eps: float = setting(1e-15, "epsilon of AdamW", above=0)
  weight_decay: float = setting(0.0, "weight decay of AdamW", low=0)
  clip_norm: float = setting(1.0, "gradients are clipped to this global norm", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
  """Devices along each mesh axis."""

  slice: int = setting(
      1, "TPU slices, each with its rows; gradients are summed across them once an update", low=1)
  data: int = setting(1, "devices on the axis that replicates the weights", low=1)
  fsdp: int = setting(
      0, "devices on the axis that shards the weights; 0: all that the other axes leave", low=0)
  sequence: int = setting(1, "devices on the axis that splits rows", low=1)
  tensor: int = setting(1, "devices on the axis that splits heads and MLPs", low=1)

  def shape(self, devices: int) -> dict[str, int]:
    """Sizes by axis for a number of devices, for `sharding.make_mesh`."""
    others = self.slice * self.data * self.sequence * self.tensor
    return dataclasses.asdict(self) | {"fsdp": self.fsdp or max(devices // others, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSettings:
  """Evaluation every `eval_every` steps (docs/watching.md). Changes no number of training."""

  prompts: str = setting(
      "", "file of the prompts to draw, one a line; empty: nothing is drawn", path=True)
  generate: str = setting(
      "", "settings to draw with, a file like configs/generate.py; empty: the checkpoint's "
      "generate.json", path=True)
  batch_size: int = setting(4, "prompts drawn side by side", low=1)
  records: int = setting(
      16, "held-out records of each mode to compute losses on, see data.held_out", low=1)
  benchmark: str = setting(
      "", "benchmark to draw and score, one without judge and detector: mini; empty: none")
  benchmark_limit: int = setting(50, "number of its first prompts to draw, one image each", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbSettings:
  """Weights & Biases, a second place for all curves, images and texts."""

  project: str = setting(
      "", "project to log to as well (pip install \"irg_jax[wandb]\"); empty: none")
  entity: str = setting("", "its user or team; empty: your own")
  mode: str = setting("online", "offline writes into OUT/wandb, for wandb sync",
                      choices=("online", "offline"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """One run of training: both stages, or one of them."""

  model: ModelConfig = ModelConfig(dtype="bfloat16", param_dtype="float32", remat="attention")
  checkpoint: str = setting("", "folder of the weights to start from", path=True)
  random_weights: bool = setting(False, "start from random weights if there is no checkpoint")
  data: DataSettings = DataSettings()
  stage1: StageSettings = StageSettings()
  stage2: StageSettings = STAGE2
  run_stages: str = setting("both", "stages to run", choices=("both", *STAGES))
  lora: LoraSettings = LoraSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  ema_decay: float = setting(
      0.995, "decay of the moving average of the weights, which is what is exported", low=0, high=1)
  timestep_shift: float = setting(
      4.0, "shift of the sampled timesteps towards noise; 1: none", above=0)
  mesh: MeshSettings = MeshSettings()
  checkpoint_every: int = setting(500, "steps between checkpoints", low=1)
  keep: int = setting(3, "number of newest checkpoints to keep", low=1)
  log_every: int = setting(10, "steps between lines in the terminal", low=1)
  eval_every: int = setting(
      0, "steps between evaluations of the moving average: images of `watch.prompts`, losses on "
      "held-out records; also at the end of a stage; 0: none", low=0)
  watch: WatchSettings = WatchSettings()
  wandb: WandbSettings = WandbSettings()
  profile_at: int = setting(
      0, "step of each stage at which a profiler trace of 3 steps starts; 0: no trace", low=0)
  seed: int = setting(
      0, "random seed of data order, dropout, noise, timesteps and initial weights", low=0)

  @property
  def stages(self) -> dict[str, StageSettings]:
    """The stages to run, by name and in order."""
    names = STAGES if self.run_stages == "both" else (self.run_stages,)
    return {name: getattr(self, name) for name in names}

  def faults(self):
    for name, stage in self.stages.items():
      if not any(stage.mixture.values()):
        yield f"{name}.mixture", "has no mode of a weight above 0"
    for name, fault in lora.faults(self.model, self.lora):
      yield f"lora.{name}", fault
    stride, patch = self.model.pixel_stride, self.model.vit.patch_size
    for name, step, side in (
        ("vae_transform", stride, self.model.max_latent_size * stride),
        ("vit_transform", patch, self.model.vit.grid_size * patch)):
      transform = getattr(self.data, name)
      if transform.stride % step:
        yield f"data.{name}.stride", (f"is {transform.stride}, but the model's tokens stand for "
                                      f"{step} pixels a side")
      if transform.max_size > side:
        yield f"data.{name}.max_size", (f"is {transform.max_size}, but the model has positions "
                                        f"for {side} pixels")


def load(path, overrides=()) -> TrainSettings:
  """Reads a configuration file like `configs/irgl.py`, with overrides ("field.path=value").

  Returns:
    Settings whose mixtures hold the modes of a weight above 0 only.

  Raises:
    ValueError: names the file or the field; see `config.read`.
  """
  settings, stages = config_lib.read(TrainSettings(), path, overrides), {}
  for name in STAGES:
    stage = getattr(settings, name)
    used = {mode: weight for mode, weight in stage.mixture.items() if weight > 0}
    stages[name] = dataclasses.replace(stage, mixture=used)
  return dataclasses.replace(settings, **stages)
