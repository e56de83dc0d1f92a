"""Data pipeline: fill of the packed rows, samples per second of a core, and what a chip needs.

  python benchmarks/data.py
  python benchmarks/data.py --rows 32 --tokenizer weights/bagel-7b

Random data of the shape of IRGL-300K: thoughts of 100 to 1500 tokens, images of 1024 x 1024
pixels, the mixtures and buffers of `configs/irgl.py`.
1. Packing: share of a row's FLOPs that is spent on tokens; the real packer packs lengths.
2. Rate: samples and images a second of one core through the whole pipeline: JPEG images are
   decoded, resized and cut into patches; with precomputed moments and without. CPU time, so that
   a busy machine does not matter.
3. Samples a second of one TPU v5p chip at 459 TFLOP/s times an assumed utilisation, against that
   rate; attention skips the blocks of scores in which nothing is visible.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import pathlib
import sys
import tempfile
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from irg_jax.chips import CHIPS
from irg_jax.data import pipeline
from irg_jax.data.batch import LENGTH_FEATURES
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.data.pipeline import exceeded_limit
from irg_jax.model.kernels import tpu, visible
from irg_jax.model.vit import patch_tokens
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer
from irg_jax.train import settings as settings_lib
from irg_jax.train.step import row_flops

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDE = 1024  # pixels
SYSTEM, PROMPT, THOUGHT = 90, (20, 200), (100, 1500)  # tokens, from and to
PEAK = CHIPS["v5p"].tflops * 1e12  # bfloat16
UTILISATION = 0.5  # assumed; high
HOST_CORES, HOST_CHIPS = 208, 4  # of a v5p host

# Parts of a sample of each mode, after the system prompt and the prompt (docs/spec.md, section 5).
SEEN, SHOWN, TARGET, GIVEN, LEARNT = "vit", "vae vit", "loss", "thought", "thought loss"
PARTS = dict(zip(MODES, (
    (SEEN, LEARNT), (LEARNT,), (LEARNT, TARGET), (SEEN, SEEN, LEARNT), (GIVEN, SHOWN, LEARNT),
    (GIVEN, SHOWN, LEARNT, TARGET))))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", type=int, default=12, help="rows to make for the rate")
  parser.add_argument("--blocks", type=int, default=40,
                      help="how often to fill all bins of the packer, by length")
  parser.add_argument("--tokenizer", help="checkpoint folder; default: one token a byte")
  args = parser.parse_args()
  settings = load_settings()
  for name, stage in settings.stages.items():
    use, used = packing_use(settings, stage, args.blocks)
    print(f"{name}: {use:.3f} of the FLOPs of a row are spent on tokens; buffers filled:",
          ", ".join(f"{k} {v:.3f}" for k, v in used.items()), f"({stage.sizes})")
    for moments in (True, False):
      rate(settings, stage, used, moments, args)


def load_settings():
  return settings_lib.load(ROOT / "configs" / "irgl.py", ["data.path=made-up"])


def packing_use(settings, stage, blocks: int, seed: int = 0):
  """Share of the FLOPs of a row that its tokens need, and the share of each buffer that is used.

  Grain's packer packs arrays of the right lengths and nothing in them, `blocks` times
  `data.bins` rows.
  """
  rng = np.random.default_rng(seed)
  empty = lambda lengths: {LENGTH_FEATURES[b]: np.zeros(n, np.int8) for b, n in lengths.items()}
  source = lambda mode: grain.MapDataset.source(
      [empty(sample_lengths(mode, settings, rng)) for _ in range(1000)]).shuffle(seed).repeat()
  modes = [source(mode).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
           for mode in stage.mixture]
  mixed = grain.IterDataset.mix(modes, list(stage.mixture.values())).filter(
      lambda sample: exceeded_limit(sample, stage.sizes, settings.data.max_sample_tokens) is None)
  packed = grain.experimental.FirstFitPackIterDataset(
      mixed, length_struct={name: stage.sizes.of_feature(name)
                            for name in LENGTH_FEATURES.values()},
      num_packing_bins=settings.data.bins)
  rows = blocks * settings.data.bins
  used = dict.fromkeys(LENGTH_FEATURES, 0.0)
  for row in itertools.islice(packed, rows):
    for buffer, name in LENGTH_FEATURES.items():
      used[buffer] += float((row[f"{name}_segment_ids"] > 0).mean()) / rows
  # Each token that is there attends to the whole row.
  und, gen = stage.sizes.und, stage.sizes.gen
  used["pairs"] = (und * used["und"] + gen * used["gen"]) / (und + gen)
  used["vit_pairs"] = used["vit"]
  full = row_flops(settings.model, stage.sizes)
  return row_flops(settings.model, stage.sizes, used) / full, used


def visited_blocks(model, rows, parts=(1, 2, 4, 8)) -> tuple[dict[int, float], float]:
  """Share of the pairs of blocks of packed rows that the TPU kernel visits.

  Returns:
    (share in the decoder by the parts of a row on as many devices, that of the busiest part; share
    in the ViT), means over the rows.
  """
  group, mean = model.llm.num_heads // model.llm.num_kv_heads, lambda values: float(np.mean(values))
  words = [mask_words(row.tokens) for row in rows]
  images = [mask_words(patch_tokens(row.vit_image)) for row in rows]
  return ({n: mean([blocks_read(*x, group, n) for x in words]) for n in parts},
          mean([blocks_read(*x, 1) for x in images]))


@jax.jit
def mask_words(tokens):
  return visible.query_words(tokens), visible.key_words(tokens)


@functools.partial(jax.jit, static_argnums=(2, 3))
def blocks_read(query_13T, key_12S, group: int, parts: int = 1):
  """Share of the pairs of blocks of a row that the TPU kernel visits in the busiest part.

  Args:
    group: query heads that share a key-value head.
    parts: devices that share the queries.
  """
  sizes = tpu.block_sizes(query_13T.shape[-1] // parts, key_12S.shape[-1], group)

  def share(query_3T):
    pairs = visible.prepare(query_3T[None, None], key_12S[None], *sizes, head_dim=0).by_query
    return pairs.start[-1] / len(pairs.outer)

  return jnp.max(jax.lax.map(share, rearrange(query_13T, "1 i (p t) -> p i t", p=parts)))


def sample_lengths(mode, settings, rng) -> dict[str, int]:
  """Length of a sample in each buffer, conditioning dropout included."""
  latents = (SIDE // settings.model.pixel_stride) ** 2
  vit = settings.data.vit_transform.size(SIDE, SIDE)
  patches = vit[0] * vit[1] // settings.model.vit.patch_size**2
  lengths = dict(und=SYSTEM + 2 + rng.integers(*PROMPT) + 2, gen=0, vit=0, text=0, samples=1)
  for part in PARTS[mode]:
    if part in (GIVEN, LEARNT):
      tokens = rng.integers(*THOUGHT)
      lengths["und"] += tokens + 2
      lengths["text"] += (tokens + 1) * (part == LEARNT)
      continue
    pieces = part.split()
    if "loss" in pieces or "vae" in pieces and rng.random() >= settings.data.dropout.vae:
      lengths["und"] += 2
      lengths["gen"] += latents
    if "vit" in pieces:
      lengths["und"] += patches + 2
      lengths["vit"] += patches
  return {name: int(n) for name, n in lengths.items()}


class MadeUp:
  """Records of one mode; a few images and moments are repeated."""

  def __init__(self, mode, settings, moments, length=10000):
    self._mode, self._length = mode, length
    rng = np.random.default_rng(0)
    self._files = [jpeg(rng) for _ in range(4)]
    z, side = settings.model.vae.z_channels, SIDE // settings.model.vae.downsample
    self._moments = np.zeros((2, side, side, z), np.float32) if moments else None

  def __len__(self):
    return self._length

  def __getitem__(self, i):
    rng = np.random.default_rng(int(i))
    parts = [TextPart("s" * SYSTEM, False), TextPart(words(rng, PROMPT), False)]
    for part in PARTS[self._mode]:
      if part in (GIVEN, LEARNT):
        parts.append(TextPart(words(rng, THOUGHT), part == LEARNT))
      else:
        flags = [name in part.split() for name in ("loss", "vae", "vit")]
        moments = self._moments if flags[0] or flags[1] else None
        parts.append(ImagePart(self._files[i % len(self._files)], *flags, moments))
    return Record(self._mode, int(i), tuple(parts))


def words(rng, length):
  letters = rng.choice(list("abcdefgh    "), rng.integers(*length))
  return "".join(letters)


def jpeg(rng):
  """An image that compresses like a photograph: smooth, with some grain."""
  coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).resize((SIDE, SIDE))
  levels = np.asarray(coarse, np.float32) + rng.normal(0, 6, (SIDE, SIDE, 3))
  file = io.BytesIO()
  Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(file, "jpeg", quality=95)
  return file.getvalue()


def open_rows(settings, stage, moments, bins: int, tokenizer=None):
  """Iterator of packed rows, each a batch of its own; `tokenizer`: a checkpoint folder or None."""
  data = dataclasses.replace(settings.data, streams=1, rows=1, workers=0, bins=bins)
  with tempfile.TemporaryDirectory() as folder:
    if not tokenizer:
      write_byte_tokenizer(folder)
    tokenizer = load_tokenizer(tokenizer or folder, settings.model.llm.vocab_size)
  sources = {mode: MadeUp(mode, settings, moments) for mode in stage.mixture}
  return pipeline.open_batches(
      data, sources, tokenizer, settings.model, mixture=stage.mixture, sizes=stage.sizes, seed=0,
      encode=lambda batch, images: batch)  # the VAE runs on the accelerator


def rate(settings, stage, used, moments, args):
  """Prints samples and images a second of a core, and what a chip needs."""
  batches = open_rows(settings, stage, moments, args.rows, args.tokenizer)
  start, wall = time.process_time(), time.time()
  rows = [next(batches) for _ in range(args.rows)]
  seconds, wall = time.process_time() - start, time.time() - wall
  samples = sum(int((row.sample_mode >= 0).sum()) for row in rows)
  seen = sum(len(np.unique(numbers[numbers >= 0])) for row in rows
             for numbers in (row.vit_image, row.latent_image))
  per_core = samples / seconds
  print(f"  {'with' if moments else 'without'} moments: {per_core:.1f} samples and "
        f"{seen / seconds:.1f} images a second of a core ({samples} samples, "
        f"{seen} images, {seconds:.1f} s of processor, {wall:.1f} s)")
  read, vit = visited_blocks(settings.model, rows, (1, 2, 4, 8) if moments else (1,))
  step = row_flops(settings.model, stage.sizes, used | {"pairs": read[1], "vit_pairs": vit}) / (
      PEAK * UTILISATION)
  eaten = samples / len(rows) / step
  cores = HOST_CORES / HOST_CHIPS
  print(f"    a v5p chip: {step * PEAK * UTILISATION:.3g} FLOPs a row (attention reads "
        f"{read[1]:.2f} of the blocks of scores) / ({PEAK:.3g} x {UTILISATION}) = {step:.2f} s, so "
        f"{eaten:.2f} samples a second: {eaten / per_core:.2f} cores of the {cores:.0f} that it has; the "
        f"pipeline on these is {per_core * cores / eaten:.0f} times as fast")
  if moments:
    print("    pairs of blocks that the kernel visits, in the busiest part of a row in so many "
          f"parts: {', '.join(f'{n}: {x:.3f}' for n, x in read.items())}; in the ViT: {vit:.3f}")


if __name__ == "__main__":
  main()
