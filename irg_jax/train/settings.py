"""Everything that `irg train` can be told, as frozen dataclasses; values in `configs/irgl.py`."""

import dataclasses
import math

from irg_jax import config as config_lib
from irg_jax import config_files
from irg_jax.config import ModelConfig
from irg_jax.data.batch import BufferSizes
from irg_jax.data.records import MODES
from irg_jax.images import ImageTransform

STAGES = ("stage1", "stage2")
NEVER = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
  """Probability that a conditioning split of each kind is dropped (spec section 3)."""

  text: float
  vit: float
  vae: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """From records to packed rows.

  Attributes:
    path: folder of the data: a published folder, or what `irg data build` wrote.
    streams: independent streams that the data is cut into; 0: one for each row of a batch.
    workers: worker processes a host, each with streams of its own; 0: none.
    rows: rows of a global batch.
    accumulate: batches whose gradients are added up before each update.
    bins: rows that a stream's packer fills at a time.
    max_sample_tokens: longer samples are skipped and counted.
    vae_transform, vit_transform: sizes of images.
    posterior: latents are a "sample" of the VAE's posterior or its "mean".
    noise_draws: noised copies of each target image, each with a time and noise of its own; a
      image is little beside the text before it, and they share that.
    ce_loss_reweighting: weighs each text by 1 / sqrt(length).
    max_rejected: share of a mode's records that may be unusable before the run stops.
  """

  path: str
  streams: int
  workers: int
  rows: int
  accumulate: int
  bins: int
  max_sample_tokens: int
  vae_transform: ImageTransform
  vit_transform: ImageTransform
  dropout: Dropout
  posterior: str
  noise_draws: int
  ce_loss_reweighting: bool
  max_rejected: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Freeze:
  """Step of the stage from which a part is not trained; -1: never.

  Attributes:
    und, gen: the decoder's experts.
    vit: the vision transformer (not its connector).
    llm: both experts, the token embedding and the text head.
  """

  und: int
  gen: int
  vit: int
  llm: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOff:
  """Step of the stage from which a loss is measured, but not trained on; -1: never."""

  ce: int
  mse: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
  """One of the two stages.

  Attributes:
    steps: updates.
    learning_rate, warmup_steps, decay_steps: constant after a linear warm-up from 0; over the
      last `decay_steps` it falls linearly to 0.
    mixture: weight of each mode by name; modes of weight 0 are left out.
    sizes: the buffers of a row, chosen for the mixture.
    freeze, loss_off: what stops learning, and from which step.
  """

  steps: int
  learning_rate: float
  warmup_steps: int
  decay_steps: int
  mixture: dict[str, float]
  sizes: BufferSizes
  freeze: Freeze
  loss_off: LossOff

  def switches(self, step: int) -> "Switches":
    """What learns in the update after `step` updates of the stage."""
    begun = lambda names: tuple(n for n, since in names.items() if since != NEVER and step >= since)
    off = begun(dataclasses.asdict(self.loss_off))
    return Switches(frozen=begun(dataclasses.asdict(self.freeze)),
                    losses=tuple(name for name in ("ce", "mse") if name not in off))


@dataclasses.dataclass(frozen=True)
class Switches:
  """What changes during a stage and is compiled in: one compilation each.

  Attributes:
    frozen: names of `Freeze` that are not trained.
    losses: "ce" and "mse", as far as they are trained on.
  """

  frozen: tuple[str, ...] = ()
  losses: tuple[str, ...] = ("ce", "mse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
  """AdamW after clipping by the global norm."""

  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
  """Devices along each mesh axis; 0 in `fsdp` takes all that the others leave."""

  data: int
  fsdp: int
  sequence: int
  tensor: int

  def shape(self, devices: int) -> dict[str, int]:
    """Sizes by axis for a number of devices, for `sharding.make_mesh`."""
    others = self.data * self.sequence * self.tensor
    return dataclasses.asdict(self) | {"fsdp": self.fsdp or max(devices // others, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """One run of training.

  Attributes:
    preset: name of the preset that the configuration file was asked for.
    model: sizes, dtypes (`dtype` of the compute, `param_dtype` of the master weights), remat.
    checkpoint: folder that training starts from; empty: random weights of `model`.
    run_stages: "both", "stage1" or "stage2".
    ema_decay: of the average of the weights that is exported.
    timestep_shift: see `flow.shift_time`.
    ce_weight, mse_weight: of the two losses in their sum.
    checkpoint_every, keep: steps between checkpoints, and how many of them are kept.
    log_every: steps between two lines of the log.
    peak_tflops: of one device, for the model FLOP utilisation; 0: by the device's name.
    profile_at, profile_steps: step of each stage from which a profiler trace is taken, and
      of how many steps; 0: none.
    seed: of data order, dropout, draws and random weights.
  """

  preset: str
  model: ModelConfig
  checkpoint: str
  data: DataSettings
  stage1: StageSettings
  stage2: StageSettings
  run_stages: str
  optimizer: OptimizerSettings
  ema_decay: float
  timestep_shift: float
  ce_weight: float
  mse_weight: float
  mesh: MeshSettings
  checkpoint_every: int
  keep: int
  log_every: int
  peak_tflops: float
  profile_at: int
  profile_steps: int
  seed: int

  @property
  def stages(self) -> dict[str, StageSettings]:
    """The stages to run, by name and in order."""
    names = STAGES if self.run_stages == "both" else (self.run_stages,)
    return {name: getattr(self, name) for name in names}


def load(path, overrides=()) -> TrainSettings:
  """Settings of a configuration file with overrides ("field.path=value").

  Raises:
    ValueError: see `config_files.load` and `from_config`.
  """
  return from_config(config_files.load(path, overrides))


def from_config(config) -> TrainSettings:
  """Checks a configuration like that of `configs/irgl.py` and makes it settings.

  Raises:
    ValueError: a field is missing, unknown or has a value that cannot be; names the field.
  """
  fields = config.to_dict()
  model = config_lib.from_dict(fields.pop("model", {}))
  for stage in STAGES:
    mixture = dict(fields.get(stage, {}).get("mixture", {}))
    for mode, weight in mixture.items():
      _require(mode in MODES, f"{stage}.mixture", f"has no mode {mode!r}; known: {list(MODES)}")
      _require(weight >= 0, f"{stage}.mixture.{mode}", f"is {weight}, but must not be negative")
    fields[stage]["mixture"] = {mode: w for mode, w in mixture.items() if w > 0}
  settings = config_lib.build(TrainSettings, fields | {"model": model}, complete=True)
  _check(settings)
  return settings


def _check(s: TrainSettings):
  d = s.data
  _require(d.path != "", "data.path", "is empty: set --config.data.path=FOLDER")
  _require(d.posterior in ("sample", "mean"), "data.posterior",
           f'is {d.posterior!r}, not "sample" or "mean"')
  _require(s.run_stages in ("both", *STAGES), "run_stages",
           f'is {s.run_stages!r}, not "both", "stage1" or "stage2"')
  lowest = {
      "data.streams": 0, "data.workers": 0, "data.rows": 1, "data.accumulate": 1, "data.bins": 1,
      "data.noise_draws": 1,
      "data.max_sample_tokens": 1, "mesh.data": 1, "mesh.fsdp": 0, "mesh.sequence": 1,
      "mesh.tensor": 1, "checkpoint_every": 1, "keep": 1, "log_every": 1, "peak_tflops": 0,
      "profile_at": 0, "profile_steps": 1,
      "seed": 0, "ce_weight": 0, "mse_weight": 0, "optimizer.weight_decay": 0}
  for stage in STAGES:
    lowest |= {f"{stage}.{name}": low for name, low in {
        "steps": 1, "learning_rate": 0, "warmup_steps": 0, "decay_steps": 0, "freeze.und": NEVER,
        "freeze.gen": NEVER, "freeze.vit": NEVER, "freeze.llm": NEVER, "loss_off.ce": NEVER,
        "loss_off.mse": NEVER}.items()}
  for name, low in lowest.items():
    value = _field(s, name)
    _require(math.isfinite(value) and value >= low, name, f"is {value}, but must be at least {low}")
  for name in ("timestep_shift", "optimizer.eps", "optimizer.clip_norm"):
    _require(_field(s, name) > 0, name, f"is {_field(s, name)}, but must be above 0")
  for name in ("ema_decay", "optimizer.b1", "optimizer.b2", "data.dropout.text",
               "data.dropout.vit", "data.dropout.vae", "data.max_rejected"):
    _require(0 <= _field(s, name) <= 1, name, f"is {_field(s, name)}, but must be within 0 and 1")
  _check_streams(d)
  for name, stage in s.stages.items():
    _require(bool(stage.mixture), f"{name}.mixture", "has no mode of a weight above 0")
  _check_images(d, s.model)


def _check_streams(d: DataSettings):
  _require(not d.streams or d.rows % d.streams == 0, "data.streams",
           f"is {d.streams}, but must divide data.rows {d.rows}")
  _require(d.workers <= (d.streams or d.rows), "data.workers",
           f"is {d.workers}, more than there are streams")


def _check_images(d: DataSettings, model: ModelConfig):
  stride, patch = model.pixel_stride, model.vit.patch_size
  grids = {"vae_transform": (d.vae_transform, stride, model.max_latent_size * stride),
           "vit_transform": (d.vit_transform, patch, model.vit.grid_size * patch)}
  for name, (transform, step, side) in grids.items():
    _require(transform.stride % step == 0, f"data.{name}.stride",
             f"is {transform.stride}, but the model's tokens stand for {step} pixels a side")
    _require(transform.max_size <= side, f"data.{name}.max_size",
             f"is {transform.max_size}, but the model has positions for {side} pixels")


def _field(settings, path):
  for name in path.split("."):
    settings = getattr(settings, name)
  return settings


def _require(condition, field, message):
  if not condition:
    raise ValueError(f"config field {field!r} {message}")
