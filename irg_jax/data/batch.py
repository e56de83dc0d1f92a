"""Packed batches: several samples a row, in the two buffers of the decoder.

A row is the concatenation of the flat arrays of its samples (`samples.sample_features`). Grain's
packer makes it for training, `pack_row` elsewhere. `finish_row` then adds what depends on the
neighbours in the row: offsets, and numbers of samples and images.
"""

import dataclasses

import jax
import numpy as np

from irg_jax.config import REQUIRED, setting
from irg_jax.images import VAE_TRANSFORM, VIT_TRAIN_TRANSFORM, ImageTransform, to_pixels
from irg_jax.tokens import PADDING, Tokens

# Feature of each buffer whose number of values is the fill of the buffer.
LENGTH_FEATURES = {"und": "und_ids", "gen": "gen_place", "vit": "vit_position",
                   "text": "text_place", "samples": "sample_mode"}


@dataclasses.dataclass(frozen=True)
class BufferSizes:
  """Capacity of a row; ValueError if a size is negative, or `samples` is 0."""

  und: int = setting(REQUIRED, "understanding tokens of a row", low=0)
  gen: int = setting(REQUIRED, "generation tokens of a row", low=0)
  vit: int = setting(REQUIRED, "ViT patches of a row", low=0)
  text: int = setting(REQUIRED, "predicted text positions of a row", low=0)
  samples: int = setting(REQUIRED, "samples of a row", low=1)

  def __post_init__(self):
    for name, size in dataclasses.asdict(self).items():
      if size < (name == "samples"):
        raise ValueError(f"buffer size {name}={size}: must be at least {int(name == 'samples')}")

  def of_feature(self, name: str) -> int:
    """Size of the buffer of the feature `name`, for example "und_ids"."""
    prefix = name.partition("_")[0]
    return getattr(self, "samples" if prefix == "sample" else prefix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
  """Probabilities that a conditioning split is dropped (docs/spec.md, section 3)."""

  text: float = setting(0.0, "probability of dropping a conditioning text", low=0, high=1)
  vit: float = setting(
      0.0, "probability of dropping the ViT view of a conditioning image", low=0, high=1)
  vae: float = setting(
      0.3, "probability of dropping the VAE view of a conditioning image", low=0, high=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """From records to packed rows."""

  path: str = setting(
      "", "folder of published data or of `irg data build`; \"sample\": made by `irg data sample`",
      path=True)
  held_out: float = setting(
      0.0, "share of records never trained on, chosen by a hash of their number; losses are "
      "computed on them, see eval_every", low=0, high=0.5)
  streams: int = setting(
      0, "independent streams that the data is split into; 0: one for each row", low=0)
  workers: int = setting(8, "worker processes on each host; 0: none", low=0)
  rows: int = setting(64, "rows of the global batch", low=1)
  accumulate: int = setting(1, "batches whose gradients are summed before an update", low=1)
  bins: int = setting(32, "rows that the packer of each stream fills at a time", low=1)
  max_sample_tokens: int = setting(
      32768, "longest sample in tokens; longer ones are skipped and counted", low=1)
  vae_transform: ImageTransform = VAE_TRANSFORM
  vit_transform: ImageTransform = VIT_TRAIN_TRANSFORM
  dropout: Dropout = Dropout()
  posterior: str = setting(
      "sample", "latents: a sample of the VAE's posterior or its mean", choices=("sample", "mean"))
  noise_samples: int = setting(
      1, "noised copies of each target image, each with its own noise and timestep", low=1,
      was="noise_draws")
  ce_loss_reweighting: bool = setting(False, "weigh each text by 1 / sqrt(length)")
  max_rejected: float = setting(
      0.01, "share of a mode's records that may be unusable", low=0, high=1)

  def faults(self):
    if not self.path:
      yield "path", "is empty: set --config.data.path=FOLDER"
    if self.streams and self.rows % self.streams:
      yield "streams", f"is {self.streams}, but must divide data.rows {self.rows}"
    if self.workers > (self.streams or self.rows):
      yield "workers", f"is {self.workers}, more than there are streams"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """B rows of packed samples; dimensions as in `irg_jax.tokens`."""

  tokens: Tokens  # [B, U + G], of [und | gen]; `sample` is the sample's column in `sample_mode`
  position: jax.Array  # int32 [B, U + G], rotary
  text_ids: jax.Array  # int32 [B, U]
  vit_index: jax.Array  # int32 [B, U], patch whose ViT embedding the token is; -1: it is an id
  text_place: jax.Array  # int32 [B, E], index in und of the token that predicts; 0 on padding
  text_target: jax.Array  # int32 [B, E], the next token, which it predicts; 0 on padding
  text_weight: jax.Array  # float32 [B, E], weight of the prediction in the mean; 0 on padding
  text_sample: jax.Array  # int32 [B, E], as `tokens.sample`; PADDING on padding
  latents: jax.Array  # float32 [B, G, latent_dim], clean
  latent_position: jax.Array  # int32 [B, G], `row * max_latent_size + column`
  latent_image: jax.Array  # int32 [B, G], number of the image in the row (one timestep each)
  latent_weight: jax.Array  # float32 [B, G], 1 on noised tokens (targets), else 0
  vit_patches: jax.Array  # [B, P, ...], as the next two: see `model.vit.Vit`
  vit_position: jax.Array
  vit_image: jax.Array
  sample_mode: jax.Array  # int32 [B, I], mode id of each sample; -1 on padding
  sample_index: jax.Array  # int32 [B, I], record number of each sample; -1 on padding


def pack_row(samples, sizes: BufferSizes) -> Batch:
  """Packs samples (`samples.sample_features`) into one row: a Batch without its B axis.

  Raises ValueError if there is no sample, or if samples do not fit the buffers.
  """
  if not samples:
    raise ValueError("a row needs at least one sample")
  row = {name: _fit([s[name] for s in samples], sizes, name) for name in samples[0]
         if name != "images"}
  segments = {buffer: np.repeat(np.arange(len(samples)) + 1, [len(s[name]) for s in samples])
              for buffer, name in LENGTH_FEATURES.items()}
  return finish_row(row, {buffer: np.pad(x, (0, getattr(sizes, buffer) - len(x)))
                          for buffer, x in segments.items()})


def finish_row(row, segments) -> Batch:
  """Concatenated samples -> row: a Batch without its B axis.

  Args:
    row: dict of the features of `samples.sample_features`, each padded to its buffer.
    segments: buffer name -> int [size]: 1 + the number of the sample in the row; 0 on padding.
  """
  und, gen, vit, text, samples = (segments[name] for name in LENGTH_FEATURES)
  before = lambda counts: np.concatenate([[0], np.cumsum(counts)])  # by segment; [0] is padding
  lengths = lambda segment: np.bincount(segment, minlength=len(samples) + 1)[1:]
  und_offset, vit_offset = before([0, *lengths(und)]), before([0, *lengths(vit)])
  # Images are numbered through the row, so that no two of them share a number.
  images = np.zeros(len(samples) + 1, np.int64)
  for name, segment in (("gen_image", gen), ("vit_image", vit)):
    np.maximum.at(images, segment, np.where(segment > 0, row[name] + 1, 0))
  image_offset = before(images)

  number = lambda values, segment, offset, padding: np.where(
      segment > 0, values + offset[segment], padding).astype(np.int32)
  both = lambda name: np.concatenate([row[f"und_{name}"], row[f"gen_{name}"]]).astype(np.int32)
  none, patches = np.zeros_like(image_offset), row["vit_patches"]
  is_vit = np.where(row["und_vit"] >= 0, und, 0)
  return Batch(
      tokens=Tokens(sample=np.concatenate([und, gen]).astype(np.int32) - 1,
                    **{name: both(name) for name in ("index", "split", "kind")}),
      position=both("position"), text_ids=row["und_ids"],
      vit_index=number(row["und_vit"], is_vit, vit_offset, -1),
      text_place=number(row["text_place"], text, und_offset, 0),
      text_target=row["text_target"], text_weight=row["text_weight"],
      text_sample=text.astype(np.int32) - 1, latents=row["gen_latents"],
      latent_position=row["gen_place"],
      latent_image=number(row["gen_image"], gen, image_offset, PADDING),
      latent_weight=row["gen_weight"],
      vit_patches=to_pixels(patches) if patches.dtype == np.uint8 else patches,
      vit_position=row["vit_position"],
      vit_image=number(row["vit_image"], vit, image_offset, PADDING),
      sample_mode=number(row["sample_mode"], samples, none, -1),
      sample_index=number(row["sample_index"], samples, none, -1))


def stack_rows(rows) -> Batch:
  """Rows of equal sizes -> one Batch."""
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def _fit(parts, sizes, name):
  parts = [part for part in parts if len(part)] or parts[:1]
  if len({part.dtype for part in parts}) > 1:  # 8-bit levels beside pixels in [-1, 1]
    raise ValueError(f"the samples of a row differ in the dtype of {name}: "
                     f"{sorted({str(part.dtype) for part in parts})}")
  values, size = np.concatenate(parts), sizes.of_feature(name)
  if len(values) > size:
    raise ValueError(f"the samples of a row have {len(values)} values of {name}, "
                     f"but the buffer holds {size}: pack fewer samples, or enlarge the buffer")
  return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1))
