"""Settings of `irg rl` (docs/rl.md); `configs/rl.py` names its presets."""

import dataclasses

from irg_jax import config as config_lib
from irg_jax.config import ModelConfig, setting
from irg_jax.generate.settings import Settings
from irg_jax.train.settings import MeshSettings, OptimizerSettings, StageSettings, WandbSettings
from irg_jax.train.step import FREEZABLE
from irg_jax.weights import lora
from irg_jax.weights.lora import LoraSettings

STAGE = "rl"  # in logs and folders, in the place of a stage of `irg train`


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTrack:
  """Learning from the sampled tokens of the thoughts."""

  weight: float = setting(1.0, "weight of the thoughts in the loss; 0: they are not trained", low=0)
  clip: float = setting(0.2, "ratios count up to 1 - clip and 1 + clip", above=0, high=1)
  divergence: float = setting(
      0.0, "weight of the tokens' divergence from the reference; above 0 it is measured", low=0)
  reward: str = setting("", "rewards of the thoughts, as `reward`; empty: the same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTrack:
  """Learning from the sampled steps of the images."""

  weight: float = setting(1.0, "weight of the images in the loss; 0: they are not trained", low=0)
  clip: float = setting(
      1e-5, "as of text; log-probabilities are means over the numbers of an image, so ratios stay "
      "near 1", above=0, high=1)
  divergence: float = setting(
      0.0, "weight of the divergence from the reference; above 0 it is measured", low=0)
  measure: str = setting(
      "velocity", "divergence: the squared difference of the velocities, or that of the whole "
      "step, which weighs it by the step's time and noise", choices=("velocity", "step"))
  reward: str = setting("", "rewards of the images, as `reward`; empty: the same")
  noise: float = setting(0.7, "a, the noise of stochastic steps", above=0)
  window: int = setting(2, "stochastic steps of an image, one after the other", low=1)
  among: int = setting(7, "the window is anywhere among so many first steps", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
  """Sampling of trajectories; never with guidance or forecasts."""

  generate: str = setting(
      "", "settings of generation, a file like configs/generate.py; empty: the checkpoint's "
      "generate.json", path=True)
  rounds: int | None = setting(None, "rounds; not set: as there, and so on", low=1, high=100)
  until_satisfied: bool | None = setting(
      None, "as there: `rounds` is the most, and a thought that finds nothing to improve keeps the "
      "image and ends them")
  steps: int | None = setting(None, "points of the flow schedule", low=2, high=10_000)
  height: int | None = setting(None, "image height in pixels", low=1, high=2**16)
  width: int | None = setting(None, "image width in pixels", low=1, high=2**16)
  think_limit: int | None = setting(None, "longest thought in tokens", low=1, high=2**14)
  temperature: float = setting(1.0, "sampling temperature of thoughts, from all tokens", low=0)
  batch_size: int = setting(16, "trajectories sampled side by side", low=1)
  keep: int = setting(2, "newest iterations whose trajectories are kept; 0: all", low=0)

  def settings(self, base: Settings) -> Settings:
    """The settings of generation; `base` are the checkpoint's."""
    fields = {name: getattr(self, name) for name in (
        "rounds", "until_satisfied", "steps", "height", "width", "think_limit")}
    one = {"text_scale": 1.0, "image_scale": 1.0}
    found = config_lib.read(base, self.generate or None)
    return config_lib.check(config_lib.update(found, {
        name: value for name, value in fields.items() if value is not None} | {
            "temperature": self.temperature, "top_k": 0, "top_p": 1.0, "first": one, "later": one,
            "forecast": {"interval": 1}}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
  """The reward "judge": any endpoint in OpenAI's form; its key is read from OPENAI_API_KEY."""

  url: str = setting("", "base address, such as http://localhost:8000/v1")
  model: str = setting("", "its name at the endpoint")
  form: str = setting(
      "grade", "a grade in words from 0 to 10, or the probability of yes, which not every endpoint "
      "tells", choices=("grade", "probability"))
  template: str = setting(
      "", "wording in place of this project's: a JSON file with \"user\", with {prompt} in it, and "
      "\"system\"", path=True)
  concurrency: int = setting(8, "questions at a time", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlSettings:
  """One run of learning from rewards."""

  model: ModelConfig = ModelConfig(dtype="bfloat16", param_dtype="float32", remat="attention")
  checkpoint: str = setting("", "folder of the weights to start from; they decide the sizes in "
                            "`model`; empty: the mini world's, in the package", path=True)
  prompts: str = setting(
      "", "file of JSON lines with a \"prompt\" in each, or a world that makes them: mini")
  tasks: tuple[str, ...] = setting(
      (), "prompts with one of these as \"tag\" alone; empty: all")
  tests: tuple[str, ...] = setting(
      (), "files of prompts, one a line or in JSON lines, that must not be among them, beside "
      "those of the benchmarks in the package")
  reward: str = setting(
      "", "rewards and their weights: verifier=1.0,judge=0.2,FILE.py:FUNCTION=0.1")
  right: float = setting(1.0, "reward from which on an image counts as right, in logs")
  judge: JudgeOptions = JudgeOptions()
  iterations: int = setting(300, "times that trajectories are sampled and learned from", low=1)
  batch: int = setting(8, "prompts of an iteration", low=1)
  group: int = setting(8, "trajectories of a prompt", low=2)
  updates: int = setting(1, "updates of an iteration, each on its share of the prompts", low=1)
  accumulate: int = setting(
      1, "parts of an update's trajectories whose gradients are summed", low=1)
  advantage_limit: float = setting(5.0, "bound of an advantage in both directions", above=0)
  discount: float = setting(
      0.0, "share of the next round's worth that a round gets beside its own reward", low=0, high=1)
  rollout: RolloutSettings = RolloutSettings()
  text: TextTrack = TextTrack()
  image: ImageTrack = ImageTrack()
  lora: LoraSettings = LoraSettings()
  freeze: tuple[str, ...] = setting(
      (), "parts that are not trained: und or gen experts, vit, llm", choices=tuple(FREEZABLE))
  optimizer: OptimizerSettings = OptimizerSettings(eps=1e-8)
  learning_rate: float = setting(1e-5, "learning rate after the warm-up", low=0)
  warmup_steps: int = setting(0, "updates of the linear warm-up from 0", low=0)
  ema_decay: float = setting(
      0.0, "decay of the moving average of the weights, which is what is exported; 0: the last "
      "weights", low=0, high=1)
  mesh: MeshSettings = MeshSettings()
  checkpoint_every: int = setting(10, "iterations between checkpoints", low=1)
  keep: int = setting(2, "number of newest checkpoints to keep", low=1)
  samples_every: int = setting(10, "iterations between sample images in the curves; 0: none", low=0)
  wandb: WandbSettings = WandbSettings()
  seed: int = setting(0, "random seed of prompts and trajectories", low=0, high=2**31)

  @property
  def trajectories(self) -> int:
    """Number of trajectories of an iteration."""
    return self.batch * self.group

  @property
  def part(self) -> int:
    """Rows, one a trajectory, of a part of an update."""
    return self.trajectories // self.updates // self.accumulate

  @property
  def stage(self) -> StageSettings:
    """The schedule of the learning rate, as of a stage of `irg train`."""
    return StageSettings(steps=self.iterations * self.updates, decay_steps=0,
                         learning_rate=self.learning_rate, warmup_steps=self.warmup_steps)

  @property
  def measured(self) -> bool:
    """Whether the reference is asked."""
    return any(track.weight and track.divergence for track in (self.text, self.image))

  def faults(self):
    if not self.prompts:
      yield "prompts", "is empty: give a file of JSON lines, or the name of a world: mini"
    if not self.reward:
      yield "reward", "is empty: say what is rewarded, such as verifier=1.0"
    if not (self.text.weight or self.image.weight):
      yield "text.weight", "is 0, and so is image.weight: there would be nothing to learn"
    if self.batch % self.updates:
      yield "updates", f"is {self.updates}, but must divide the {self.batch} prompts of `batch`"
    elif self.trajectories // self.updates % self.accumulate:
      yield "accumulate", (f"is {self.accumulate}, but must divide the "
                           f"{self.trajectories // self.updates} trajectories of an update")
    if self.text.weight and not self.rollout.temperature:
      yield "rollout.temperature", "is 0: greedy thoughts are all alike; set text.weight to 0"
    if self.image.window > self.image.among:
      yield "image.window", f"is {self.image.window}, more than image.among {self.image.among}"
    if self.mesh.slice > 1:
      yield "mesh.slice", "is more than 1, but trajectories are sampled within one slice"
    for name, fault in lora.faults(self.model, self.lora):
      yield f"lora.{name}", fault

  def check_generation(self, settings: Settings) -> None:
    """Raises ValueError where the settings of generation and the tracks do not go together."""
    if self.text.weight and not settings.think:
      raise ValueError("config field 'text.weight' is above 0, but the checkpoint's settings of "
                       "generation say think=False: there are no thoughts to train")
    if self.image.weight and self.image.among > settings.steps - 1:
      raise ValueError(f"config field 'image.among' is {self.image.among}, but trajectories have "
                       f"{settings.steps - 1} steps: lower it, or raise rollout.steps")
    if settings.window is not None and settings.window < settings.rounds - 1:
      raise ValueError(f"config field 'rollout.rounds' is {settings.rounds}, but a round sees "
                       f"{settings.window} earlier ones (window): set rounds to "
                       f"{settings.window + 1}")


def load(path, overrides=()) -> RlSettings:
  """Reads a configuration file like `configs/rl.py`, with overrides; see `config.read`."""
  return config_lib.read(RlSettings(), path, overrides)


def seed_of(seed: int, iteration: int, row: int, rows: int) -> int:
  """Seed of a trajectory, from 0 to 2**32 - 1; no two of a run share one before 4e9 of them."""
  return (seed * 0x9E3779B1 + iteration * rows + row) % 2**32
