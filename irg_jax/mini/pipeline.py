"""One `irg mini run`, from nothing to a trained model: the story of the paper, top to bottom.

    autoencoder      painted images                              -> start
    base             words alone, then prompts, plans, images    -> base/stage2/weights
    trajectories     the base model's own thoughts and images,
                     what the verifier says, the better image    -> trajectories
    quality          the base model on better images alone       -> quality/stage2/weights
    irgl             the base model in the paper's two stages      -> irgl/stage2/weights
    checkpoint       that in half the bytes, as it is shipped      -> checkpoint
    evaluate         all of them draw the test                     -> evaluation, report

Each step leaves a folder that appears when it is complete, or goes on where it was stopped.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
from flax import traverse_util
import numpy as np

from irg_jax import config as config_lib
from irg_jax import runs, sharding, weights
from irg_jax.data import array_records, latents, parquet, sources
from irg_jax.data.records import MODES
from irg_jax.storage import atomic_file, atomic_folder, write_json
from irg_jax.generate import irg
from irg_jax.generate import run as generate_run
from irg_jax.generate.settings import Defaults, write_defaults
from irg_jax.mini import (
    datasets, report, thoughts, tokenizer, vae, verifier, world)
from irg_jax.mini.settings import MiniSettings
from irg_jax.mini.steps import STEPS
from irg_jax.model.vae import encode_levels
from irg_jax.progress import Progress
from irg_jax.train import run as train_run
from irg_jax.train import settings as train_settings
from irg_jax.weights import init, published
from irg_jax.tokenizer import load_tokenizer

_NOTE = (f"It draws one to five shapes ({', '.join(world.SHAPES)}) in {', '.join(world.COLORS)}, "
         "counted, coloured, and placed left of, right of, above or below each other: try \"two "
         'red circles left of a blue star". For anything else, give --checkpoint a model that was '
         "trained on it.")
BASE_MODES = (datasets.TELL, "initial_thinking_understanding_learning", "initial_full_learning")


def run(settings: MiniSettings, out, until: str | None = None) -> int:
  """Runs the steps that are not done yet, in order.

  Args:
    out: folder of the run, new or gone on with.
    until: name of the last step to run; None runs all.

  Returns:
    exit status: 0, or that of a training that was asked to stop.
  """
  out = pathlib.Path(out)
  _record(out / "mini.json", settings)
  for name in STEPS:
    print(f"irg mini: {name}", flush=True)
    if status := _STEPS[name](settings, out):
      return status
    if name == until:
      break
  return 0


def make_start(settings: MiniSettings, out: pathlib.Path) -> None:
  """The checkpoint before anything but the autoencoder has learned: weights, tokenizer."""
  if (out / "start").exists():
    return
  vae_params = _given_vae(settings) if settings.autoencoder else _trained_vae(settings, out)
  params = init.random_params(settings.model, jax.random.key(settings.seed))
  with atomic_folder(out / "start") as folder:
    words = folder / "words"
    words.mkdir()
    tokenizer.write_tokenizer(words, sample_texts(settings), settings.model.llm.vocab_size)
    published.save(folder / "weights", params | {"vae": vae_params}, settings.model, source=words)
    write_defaults(folder / "weights", Defaults(
        settings=settings.generate, system_prompt=thoughts.SYSTEM_PROMPT,
        words=tuple(world.words()), note=_NOTE, dtype=settings.model.dtype))


def _trained_vae(settings, out):
  with Progress() as progress:
    return vae.train(
        settings.model.vae, out / "vae.msgpack", steps=settings.vae_steps,
        batch=settings.vae_batch, learning_rate=settings.vae_learning_rate,
        images=settings.vae_pictures, seed=settings.seed, progress=progress)


def _given_vae(settings):
  config, params = weights.load_checkpoint(settings.autoencoder, part="vae", dtype="float32")
  if config.vae != settings.model.vae:
    raise ValueError(f"config field 'autoencoder': that of {settings.autoencoder} has the sizes "
                     f"{config.vae}, but config.model.vae says {settings.model.vae}; give one of "
                     "these sizes, or none to train it")
  return params["vae"]


def sample_texts(settings: MiniSettings, count: int = 6000) -> list[str]:
  """Texts of every kind, for the tokenizer to learn its words from."""
  rng = _rng(settings, "words")
  return [t for _, row in datasets.base_rows(count, rng) for t in datasets.texts(row)]


def train_base(settings: MiniSettings, out: pathlib.Path) -> int:
  """The stand-in for BAGEL: stage 1 is the language model that it began as."""
  if not (out / "base_rows").exists():
    with atomic_folder(out / "base_rows") as folder, parquet.Writer(folder) as writer:
      for mode, row in datasets.base_rows(settings.base_rows, _rng(settings, "base")):
        writer.add(mode, row)
  _prepare(out / "base_rows", out / "base_data", BASE_MODES, out / "start" / "weights", settings)
  return _train(settings, "base", out / "base_data", out / "start" / "weights", out / "base")


def make_trajectories(settings: MiniSettings, out: pathlib.Path) -> None:
  """What the base model draws of its own plans, judged, and the better images, as IRGL."""
  if not (out / "trajectories").exists():
    sample_first_rounds(settings, base_weights(out), out / "first_rounds")
    _write_judged(settings, out)
  _prepare(out / "trajectories", out / "irgl_data", MODES, out / "start" / "weights",
           settings)


def _write_judged(settings, out):
  with atomic_folder(out / "trajectories") as folder, parquet.Writer(folder) as writer:
    counts = write_trajectories(settings, out / "first_rounds", writer)
    if not counts["right"] + counts["wrong"]:
      raise ValueError(f"none of the base model's first pictures can be used ({counts}): train "
                       "the autoencoder and the base longer")
  write_json(out / "trajectories.json", counts, indent=1)
  print(f"irg mini: first pictures of the base model: {counts}")


def sample_first_rounds(settings: MiniSettings, checkpoint, out: pathlib.Path) -> None:
  """Thoughts and first images of training prompts: `out`/NNNN.npz, one a batch."""
  out.mkdir(exist_ok=True)
  rng = _rng(settings, "trajectories")
  records = [world.training_record(rng) for _ in range(settings.trajectories)]
  size = settings.sample_batch
  mesh = sharding.make_mesh(None)
  with Progress() as progress, jax.set_mesh(mesh):
    model, params = generate_run.load_model(checkpoint, mesh, None, progress)
    words = load_tokenizer(checkpoint, settings.model.llm.vocab_size)
    for start in range(0, len(records), size):
      path = out / f"{start:06}.npz"
      if path.exists():
        continue
      batch = records[start:start + size]
      batch += batch[:1] * (size - len(batch))  # another batch size would compile anew
      drawn = irg.generate(
          model, params, words, [r["prompt"] for r in batch],
          seeds=range(start, start + size), settings=settings.first,
          system_prompt=thoughts.SYSTEM_PROMPT)
      firsts = [trajectory.rounds[0] for trajectory in drawn]
      with atomic_file(path) as aside, aside.open("wb") as file:
        np.savez(file, records=json.dumps(batch), thoughts=[r.thought.text for r in firsts],
                 pictures=np.stack([r.image for r in firsts]))
      progress("drawing first pictures", 0, start + size, len(records))


def write_trajectories(settings: MiniSettings, folder, writer) -> dict[str, int]:
  """Writes the rows of every usable first image; returns counts, by reason where none.

  The six modes, and words alone that are replayed.
  """
  rng, counts, left = _rng(settings, "better"), {"right": 0, "wrong": 0}, settings.trajectories
  for path in sorted(folder.glob("*.npz")):
    batch = np.load(path)
    rows = zip(json.loads(str(batch["records"])), batch["thoughts"], batch["pictures"])
    for record, plan, image in list(rows)[:left]:
      try:
        verdict = verifier.score(image, record)
        better = thoughts.improve(record, verdict, rng)
        modes = list(datasets.trajectory_rows(record, str(plan), image, verdict, better, rng))
      except thoughts.Inexpressible as e:
        counts[str(e)] = counts.get(str(e), 0) + 1
        continue
      counts["right" if verdict.correct else "wrong"] += 1
      for mode, row in [*modes, *datasets.replayed_rows(rng)]:
        writer.add(mode, row)
    left -= len(batch["thoughts"])
  return counts


def train_quality(settings: MiniSettings, out: pathlib.Path) -> int:
  """The ablation: better images and their plans, nothing interleaved."""
  return _train(settings, "quality", out / "irgl_data", base_weights(out), out / "quality")


def train_irgl(settings: MiniSettings, out: pathlib.Path) -> int:
  """The two stages of the paper."""
  return _train(settings, "irgl", out / "irgl_data", base_weights(out), out / "irgl")


def make_checkpoint(settings: MiniSettings, out: pathlib.Path) -> None:
  """What is shipped, and so what is measured."""
  del settings
  if not (out / "checkpoint").exists():
    weights.convert(out / "irgl" / "stage2" / "weights", out / "checkpoint", to="published",
                    dtype="bfloat16")


def evaluate_run(settings: MiniSettings, out: pathlib.Path) -> None:
  """What was learned, measured: `irg mini report` makes the same from what is drawn here."""
  del settings  # mini.json has them
  print(f"irg mini: wrote {report.run(out)}")


_STEPS = dict(zip(STEPS, (make_start, train_base, make_trajectories, train_quality, train_irgl,
                          make_checkpoint, evaluate_run), strict=True))


def base_weights(out: pathlib.Path) -> pathlib.Path:
  return out / "base" / "stage2" / "weights"


def _train(settings, preset, data, checkpoint, out):
  # The presets have sizes of their own.
  sizes = traverse_util.flatten_dict(dataclasses.asdict(settings.model), sep=".")
  overrides = [*(f"model.{name}={value}" for name, value in sizes.items()), f"data.path={data}",
               f"checkpoint={checkpoint}", f"seed={settings.seed}", *settings.train]
  return train_run.run_train(
      train_settings.load(f"{settings.config}:{preset}", overrides), out)


def _prepare(rows, out, modes, checkpoint, settings):
  """`irg data build` and `irg data encode-latents` of published rows."""
  built, encoded = rows.with_name(f"{out.name}.built"), rows.with_name(f"{out.name}.encoded")
  if out.exists():
    shutil.rmtree(built, ignore_errors=True)
    return
  with Progress() as progress:
    if not built.exists():
      array_records.build(rows, built, modes, progress=progress)
    opened = sources.open_sources(built, modes, progress=progress)
    _, params = weights.load_checkpoint(checkpoint, part="vae")
    encoder = latents.Encoder(settings.model, params["vae"], encode_levels)
    latents.encode_dataset(opened, encoded, encoder,
                          settings.generate.vae_transform, progress=progress)
  encoded.rename(out)
  shutil.rmtree(built)


def _record(path, settings):
  """Records the settings of the run, after checking them against those that it was started with."""
  now = dataclasses.asdict(settings) | {"config": None}  # a path of this machine
  if path.exists():
    runs.check_same(runs.read(path), now, f"--out {path.parent}", flag="--config.",
                    renamed=config_lib.renamed(MiniSettings))
  runs.write(path, now)


def _rng(settings, purpose):
  """A generator for one purpose: no two of them see the same draws."""
  names = ("words", "base", "trajectories", "better")
  return np.random.default_rng([settings.seed, names.index(purpose)])
