"""`irg mini run`: all steps from nothing to a trained and measured model.

    autoencoder      painted images; in world 2 the ViT, too         -> start
    base             text alone, then prompts, plans, images         -> base/stage2/weights
    trajectories     thoughts and images of the base model, the
                     verifier's verdict, the improved image          -> trajectories
    quality          the base model, on improved images alone        -> quality/stage2/weights
    irgl             the base model, in the two stages of the paper  -> irgl/stage2/weights
    checkpoint       the same in bfloat16, as it is shipped          -> checkpoint
    evaluate         the test with all of these models               -> evaluation, report

A folder of results appears when it is complete; a step that was stopped continues where it was.
"""

import dataclasses
import functools
import pathlib
import shutil

import jax
from flax import traverse_util

from irg_jax import config as config_lib
from irg_jax import runs, storage, weights
from irg_jax.config import ModelConfig, setting
from irg_jax.data import latents, parquet, sources
from irg_jax.data.records import MODES
from irg_jax.generate import prompts
from irg_jax.generate import settings as generate_settings
from irg_jax.mini import STEPS, datasets, report, thoughts, trajectories, vae, vit
from irg_jax.mini.world import COLORS, WORLD1, WORLDS, World, prompt_rules
from irg_jax.model.vae import encode_levels
from irg_jax.progress import Progress
from irg_jax.train import run as train_run
from irg_jax.train import settings as train_settings
from irg_jax.tokenizer import train_tokenizer
from irg_jax.weights import init, published

# Of 108 images of five things of two kinds, 23 were wrong; of four, 22 of 180.
_SURE = 4
_NOTE = ("It draws one to {most} shapes ({shapes}) in {colors}{details}, "
         "counted, coloured, and placed left of, right of, above or below each other: try \"two "
         'red circles left of a blue star". For anything else, give --checkpoint a model that was '
         "trained on it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings of `irg mini run`; those of the model and of generation are in the file."""

  config: str = ""  # FILE.py:PRESET of the run; other presets of the file are its trainings
  model: ModelConfig = ModelConfig()
  world: str = setting("1", "world of its scenes and prompts, see irg_jax/mini/world.py",
                       choices=tuple(WORLDS))
  seed: int = setting(0, "random seed of everything", low=0)
  vae_steps: int = setting(16000, "updates of the autoencoder", low=1)
  vae_batch: int = setting(2, "images in an update of the autoencoder", low=1)
  vae_learning_rate: float = setting(1e-3, "peak learning rate of the autoencoder", above=0)
  vae_images: int = setting(
      6000, "distinct images to train the autoencoder on", low=1, was="vae_pictures")
  vit_steps: int = setting(
      0, "updates of the ViT before the base model, on as many images; 0: it starts random", low=0)
  autoencoder: str = setting(
      "", "checkpoint folder to take the autoencoder from; empty: train one", path=True)
  base: str = setting(
      "", "checkpoint folder of a base model of the same sizes, and its autoencoder; empty: train "
      "them", path=True)
  base_rows: int = setting(72000, "rows to train the base model on", low=1)
  trajectories: int = setting(6000, "prompts of the trajectories for the two stages", low=1)
  first_temperature: float = setting(
      1.0, "sampling temperature of their thoughts; high: more images to improve", low=0)
  altered_plans: float = setting(
      0.0, "share of their first images drawn after a plan that was altered, so that only looking "
      "tells that they are wrong", low=0, high=1)
  sample_batch: int = setting(64, "prompts generated side by side", low=1)
  train: tuple[str, ...] = setting((), "overrides for every training, \"field=value\"")
  test_seen: int = setting(168, "test prompts of combinations seen in training", low=1)
  test_unseen: int = setting(96, "test prompts of combinations not seen in training", low=0)
  test_images: int = setting(4, "images of a test prompt", low=1, was="test_pictures")
  generate: generate_settings.Settings = generate_settings.Settings()

  @property
  def in_world(self) -> World:
    return WORLDS[self.world]

  @property
  def first(self) -> generate_settings.Settings:
    """Settings of the base model's thoughts and images in the trajectories."""
    return dataclasses.replace(self.generate, rounds=1, temperature=self.first_temperature)


def load(path, overrides=()) -> Settings:
  """Reads a preset of a configuration file like `configs/mini.py`, see `config.read`.

  The preset is "world" where `path` names none ("FILE.py:PRESET").
  """
  file, preset, overrides = config_lib.locate(path, overrides)
  path = f"{file}:{preset or 'world'}"
  settings = config_lib.read(Settings(), path, overrides)
  settings.generate.validate(settings.model)
  settings.first.validate(settings.model)
  return dataclasses.replace(settings, config=path)


def run(settings: Settings, out, until: str | None = None) -> int:
  """Runs the steps that are not done, in order, the last of them `until`.

  Returns the exit status: 0, or that of a training that was asked to stop. ValueError names the
  settings that differ from those of the run in `out`.
  """
  out = pathlib.Path(out)
  check_same(settings, out)
  for name in STEPS:
    print(f"irg mini: {name}", flush=True)
    if status := _STEPS[name](settings, out):
      return status
    if name == until:
      break
  return 0


def check_same(settings: Settings, out: pathlib.Path) -> None:
  """Records the settings of a run; ValueError if it was started with others."""
  now = dataclasses.asdict(settings) | {"config": None}  # the file may move
  if (out / "mini.json").exists():
    new = {name: getattr(Settings(), name)
           for name in ("world", "altered_plans", "base", "vit_steps")}
    recorded = new | runs.read(out / "mini.json")
    recorded["generate"] = generate_settings.with_new(
        recorded.get("generate", {}), now["generate"])
    runs.check_same(recorded, now, f"--out {out}", flag="--config.",
                    free=("model.attention", "base"), renamed=config_lib.renamed(Settings))
  runs.write(out / "mini.json", now)


def make_start(settings: Settings, out: pathlib.Path) -> None:
  """A checkpoint with the autoencoder, maybe a trained ViT, random other weights, the tokenizer.

  With `settings.base` it is that base model.
  """
  if (out / "start").exists():
    return
  if settings.base:
    return _copy_base(settings, out / "start")
  if settings.autoencoder:
    sizes, vae_params = weights.load_autoencoder(settings.autoencoder, "float32")
    if sizes != settings.model.vae:
      raise ValueError(f"config field 'autoencoder': that of {settings.autoencoder} has the sizes "
                       f"{sizes}, but config.model.vae says {settings.model.vae}; give one of "
                       "these sizes, or none to train it")
  else:
    with Progress() as progress:
      vae_params = vae.train(
          settings.model.vae, out / "vae.msgpack", steps=settings.vae_steps,
          batch=settings.vae_batch, learning_rate=settings.vae_learning_rate,
          images=settings.vae_images, seed=settings.seed, world=settings.in_world,
          progress=progress)
  params = init.random_params(settings.model, jax.random.key(settings.seed))
  if settings.vit_steps:
    with Progress() as progress:
      params["transformer"]["vit"] = vit.train(
          settings.model, params["transformer"]["vit"], steps=settings.vit_steps,
          images=settings.vae_images, seed=settings.seed, world=settings.in_world,
          progress=progress)
  with storage.atomic_folder(out / "start") as folder:
    words = folder / "words"
    words.mkdir()
    train_tokenizer(words, sample_texts(settings), settings.model.llm.vocab_size)
    published.save(folder / "weights", params | {"vae": vae_params}, settings.model, source=words)
    generate_settings.write_defaults(folder / "weights", defaults(settings))


def defaults(settings: Settings) -> generate_settings.Defaults:
  """The `generate.json` of a run's checkpoints."""
  world, first = settings.in_world, settings.in_world is WORLD1
  note = _NOTE.format(
      most="five" if first else world.most, shapes=", ".join(world.shapes),
      colors=", ".join(COLORS), details="" if first else f", {', '.join(world.details)}")
  # Only the first world's model needs its prompts brought into one form.
  form = prompts.PromptForm(
      rules=prompt_rules() if first else (), most=world.most, sure=_SURE if first else 0, note=note,
      sizes=(f"{settings.generate.width}x{settings.generate.height}",), editing=False)
  return generate_settings.Defaults(
      settings=settings.generate, system_prompt=thoughts.SYSTEM_PROMPT, prompts=form,
      satisfied=thoughts.SATISFIED, dtype=settings.model.dtype)


def sample_texts(settings: Settings, count: int | None = None) -> list[str]:
  """Texts of `count` rows of every kind to learn the tokenizer from (6000, or `base_rows`)."""
  count = count or min(6000, settings.base_rows)
  rows = datasets.base_rows(count, datasets.generator(settings.seed, "words"), settings.in_world)
  return [text for _, row in rows for text in datasets.texts(row)]


def train_base(settings: Settings, out: pathlib.Path) -> int:
  """The stand-in for BAGEL; its stage 1 trains the language model that BAGEL starts from."""
  if settings.base:
    if not base_weights(out).exists():
      _copy_base(settings, base_weights(out).parent)
    return 0
  if not (out / "base_rows").exists():
    with storage.atomic_folder(out / "base_rows") as folder:
      parquet.write(folder, datasets.base_rows(
          settings.base_rows, datasets.generator(settings.seed, "base"), settings.in_world))
  modes = datasets.TELL, datasets.LOOK, datasets.DRAW
  _prepare(settings, out, "base_rows", "base_data", modes)
  return _train(settings, out, "base", data="base_data", checkpoint=out / "start" / "weights")


def make_trajectories(settings: Settings, out: pathlib.Path) -> None:
  """The base model's thoughts and images, judged and improved, in IRGL's form."""
  if not (out / "trajectories").exists():
    trajectories.sample_first_rounds(settings, base_weights(out), out / "first_rounds")
    trajectories.write_trajectories(settings, out)
  _prepare(settings, out, "trajectories", "irgl_data", MODES)


def make_checkpoint(_, out: pathlib.Path) -> None:
  """The model as it is shipped and evaluated."""
  if not (out / "checkpoint").exists():
    weights.convert(out / "irgl" / "stage2" / "weights", out / "checkpoint", to="published",
                    dtype="bfloat16")


def evaluate_run(_, out: pathlib.Path) -> None:
  """The test of all models, and the report."""
  print(f"irg mini: wrote {report.run(out)}")


def _copy_base(settings, target):
  """Copies the base model to `target`/weights, with this run's settings of generation.

  ValueError if it has other sizes.
  """
  config = weights.read_config(pathlib.Path(settings.base))
  for name in ("llm", "vit", "vae", "max_latent_size", "latent_patch_size"):
    if (own := getattr(config, name)) != (asked := getattr(settings.model, name)):
      raise ValueError(f"config field 'base': {settings.base} has the sizes {own}, but "
                       f"config.model.{name} says {asked}; give one of these sizes, or none to "
                       "train it")
  with storage.atomic_folder(target) as folder:
    shutil.copytree(settings.base, folder / "weights")
    generate_settings.write_defaults(folder / "weights", defaults(settings))


def base_weights(out: pathlib.Path) -> pathlib.Path:
  return out / "base" / "stage2" / "weights"


def training(settings, out, preset, data="irgl_data", checkpoint=None, without=""):
  """`irg train`'s settings of a training of the run's preset, with the sizes of this run.

  `without` is a mode whose rows are left out; a batch has as many packed rows of the others.
  """
  sizes = traverse_util.flatten_dict(dataclasses.asdict(settings.model), sep=".")
  overrides = [*(f"model.{field}={value}" for field, value in sizes.items()),
               f"data.path={out / data}", f"checkpoint={checkpoint or base_weights(out)}",
               f"seed={settings.seed}", *settings.train]
  if without:
    overrides += [f"{stage}.mixture.{without}=0" for stage in train_settings.STAGES]
  config = f"{settings.config}-{preset}".replace(":world-", ":")
  return train_settings.load(config, overrides)


def _train(settings, out, preset, name="", **options):
  """`irg train` of a `training`, into `out`/`name`, by default the preset's."""
  return train_run.run_train(training(settings, out, preset, **options), out / (name or preset))


# The ablation of the paper: improved images and their plans, nothing interleaved.
train_quality = functools.partial(_train, preset="quality")
# The two stages of the paper.
train_irgl = functools.partial(_train, preset="irgl")

_STEPS = dict(zip(STEPS, (make_start, train_base, make_trajectories, train_quality, train_irgl,
                          make_checkpoint, evaluate_run), strict=True))


def _prepare(settings, out, rows, data, modes):
  """`irg data build` and `irg data encode-latents` of published rows."""
  built, encoded = out / f"{data}.built", out / f"{data}.encoded"
  if not (out / data).exists():
    with Progress() as progress:
      if not built.exists():
        sources.build(out / rows, built, modes, progress=progress)
      opened = sources.open_sources(built, modes, progress=progress)
      _, params = weights.load_checkpoint(out / "start" / "weights", part="vae")
      encoder = latents.Encoder(settings.model, params["vae"], encode_levels)
      latents.encode_dataset(opened, encoded, encoder, settings.generate.vae_transform,
                             progress=progress)
    encoded.rename(out / data)
  shutil.rmtree(built, ignore_errors=True)
