"""Records to training samples: splits, then flat arrays (docs/spec.md, sections 3 and 5).

`record_splits` brings images to their size, applies conditioning dropout and samples the noise of
VAE posteriors. `sample_features` lays the splits out as tokens with positions and metadata.
"""

import dataclasses

import einops
import numpy as np

from irg_jax import images
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.tokens import CAUSAL, FULL, NOISE


@dataclasses.dataclass(frozen=True)
class TextSplit:
  """`<|im_start|> ids <|im_end|>`; a target if `need_loss`."""

  ids: list[int]
  need_loss: bool = False


@dataclasses.dataclass(frozen=True)
class ImageSplit:
  """An image in up to three roles, each of which becomes a split of its own.

  `pixels` are those of an image that is not encoded yet; `latents` are then the standard normal
  noise of its posterior, see `latents.Encoder`.
  """

  latents: np.ndarray | None  # float [Y, X, latent_dim], clean; None: only the ViT sees the image
  vit_patches: np.ndarray | None  # [Y, X, patch * patch * 3], uint8 levels or float in [-1, 1]
  need_loss: bool = False  # the image is a target (noised split)
  need_vae: bool = False  # it is a condition (clean VAE split)
  need_vit: bool = False  # it is a condition (ViT split)
  pixels: np.ndarray | None = None  # uint8 [H, W, 3]


@dataclasses.dataclass(frozen=True)
class DroppedImage:
  """A condition image removed by dropout; its rotary position stays used."""


def record_features(record: Record, tokenizer, model: ModelConfig, data, rng) -> dict:
  """`sample_features` of a record; arguments and errors as of `record_splits`."""
  try:
    splits = record_splits(record, tokenizer, model, data, rng)
    return sample_features(
        splits, model, tokenizer.special, mode=MODES.index(record.mode), index=record.index,
        ce_loss_reweighting=data.ce_loss_reweighting)
  except ValueError as e:
    raise ValueError(f"{record.mode}, record {record.index}: {e}") from e


def record_splits(record: Record, tokenizer, model: ModelConfig, data, rng) -> list:
  """Splits of a record: each role of an image is one, with its own noise of the VAE's posterior.

  An image without moments yields a split with `pixels`. `data` is `batch.DataSettings`, `rng` a
  numpy Generator. Raises ValueError if a text or an image cannot be used.
  """
  splits = []
  for number, part in enumerate(record.parts):
    if isinstance(part, TextPart):
      # A target is never dropped, and a dropped text leaves no gap in the positions.
      if part.need_loss or not _drop(data.dropout.text, rng):
        splits.append(TextSplit(tokenizer.encode(part.text), part.need_loss))
    else:
      splits += _image_splits(part, f"image in part {number}", model, data, rng)
  return splits


def posterior_latents(moments, noise_YXC, model: ModelConfig) -> np.ndarray:
  """Latent tokens of a VAE posterior, in numpy, so that worker processes need no device.

  Args:
    moments: float [2, h, w, z], mean and log-variance, unscaled.
    noise_YXC: float32 [h / patch, w / patch, latent_dim], standard normal; zeros for the mean.

  Returns:
    float32, shape of `noise_YXC`.
  """
  patch = model.latent_patch_size
  mean_YXC, logvar_YXC = einops.rearrange(
      moments.astype(np.float32), "m (y p) (x q) c -> m y x (p q c)", p=patch, q=patch)
  scale, shift = np.float32(model.vae.scale_factor), np.float32(model.vae.shift_factor)
  return scale * (mean_YXC + np.exp(np.float32(0.5) * logvar_YXC) * noise_YXC - shift)


def sample_features(splits, config: ModelConfig, special: SpecialTokens, *, mode: int = 0,
                    index: int = 0, ce_loss_reweighting: bool = False) -> dict:
  """Lays a sample out as flat arrays, which are concatenated with other samples' to a row.

  Args:
    splits: list of TextSplit, ImageSplit and DroppedImage.
    mode, index: mode id and record number, the name of the sample.
    ce_loss_reweighting: weighs each predicted token by 1 / sqrt(predicted tokens of its split)
      instead of 1 (docs/spec.md, section 4).

  Returns:
    dict of numpy arrays, int32 unless stated, over U und tokens, G latent tokens, P patches and
    E predicted tokens:
      und_ids, und_vit [U] (`und_vit` indexes the patches, -1: a text token);
      und_position, und_index, und_split, und_kind [U], gen_* [G]: rotary positions and the
        fields of `tokens.Tokens`;
      gen_latents float32 [G, latent_dim], gen_place, gen_image [G], gen_weight float32 [G]
        (1 on noised tokens, the targets);
      vit_patches [P, patch * patch * 3] (uint8 or float32, as given), vit_position,
        vit_image [P];
      text_place [E] (index in und of the token that predicts), text_target [E] (the token
        that it predicts), text_weight float32 [E];
      sample_mode, sample_index [1];
    and `images`, a list of (first token in gen, uint8 [H, W, 3]): images to encode.

  Raises:
    ValueError: ids beyond the vocabulary; an image without the arrays that its roles need, or
      with more latent tokens or patches a side than the model has positions for.
  """
  layout = _Layout(config, special, ce_loss_reweighting)
  for split in splits:
    if isinstance(split, TextSplit):
      layout.text(split)
    elif isinstance(split, DroppedImage):
      layout.position += 1
    else:
      if split.need_loss:
        layout.latents(split, NOISE)
      if split.need_vae:
        layout.latents(split, FULL)
      if split.need_vit:
        layout.vit(split.vit_patches)
  arrays = {name: np.concatenate(parts) for name, parts in layout.columns.items()}
  return arrays | {"sample_mode": np.array([mode], np.int32),
                   "sample_index": np.array([index], np.int32), "images": layout.images}


def _image_splits(part: ImagePart, name, model, data, rng):
  """Splits of an image in the order noised, clean, ViT."""
  keep_vae = part.need_vae and not _drop(data.dropout.vae, rng)
  keep_vit = part.need_vit and not _drop(data.dropout.vit, rng)
  to_encode = part.moments is None and (part.need_loss or keep_vae)
  image = images.decode_image(part.data, name) if to_encode or keep_vit else None
  pixels = data.vae_transform(image) if to_encode else None
  splits = []
  if part.need_loss:
    splits += [_latent_split(part.moments, pixels, model, data, rng, need_loss=True)
               for _ in range(data.noise_samples)]
  if part.need_vae:
    splits.append(_latent_split(part.moments, pixels, model, data, rng, need_vae=True)
                  if keep_vae else DroppedImage())
  if keep_vit:
    view, patch = data.vit_transform(image), model.vit.patch_size
    patches_YXC = einops.rearrange(
        images.patchify(view, patch), "(y x) c -> y x c", y=view.shape[0] // patch)
    splits.append(ImageSplit(None, patches_YXC, need_vit=True))
  elif part.need_vit:
    splits.append(DroppedImage())
  return splits


def _latent_split(moments, pixels, model, data, rng, **role):
  height, width = np.shape(moments)[1:3] if pixels is None else pixels.shape[:2]
  unit = model.latent_patch_size if pixels is None else model.pixel_stride
  if height % unit or width % unit:
    raise ValueError(f"an image of {height} x {width} {'latents' if pixels is None else 'pixels'}"
                     f" does not divide into latent tokens of {unit} a side; check vae_transform")
  shape = (height // unit, width // unit, model.latent_dim)
  noise_YXC = (rng.standard_normal(shape, np.float32) if data.posterior == "sample" else
               np.zeros(shape, np.float32))
  if pixels is not None:
    return ImageSplit(noise_YXC, None, pixels=pixels, **role)
  return ImageSplit(posterior_latents(moments, noise_YXC, model), None, **role)


def _drop(probability, rng):
  # One value is sampled at any probability, so that changing one leaves the others as they were.
  return rng.random() < probability


class _Layout:
  """Features of one sample while they grow: lists of arrays to concatenate, the first one empty."""

  def __init__(self, config, special, reweighting):
    self._config, self._special, self._reweighting = config, special, reweighting
    self._patch_dim = config.vit.patch_size**2 * 3
    whole, real = np.zeros(0, np.int32), np.zeros(0, np.float32)
    tokens = dict.fromkeys(("position", "index", "split", "kind"), whole)
    empty = {"und": {"ids": whole, "vit": whole} | tokens,
             "gen": {"latents": np.zeros((0, config.latent_dim), np.float32), "place": whole,
                     "image": whole, "weight": real} | tokens,
             "vit": {"patches": np.zeros((0, self._patch_dim), np.uint8), "position": whole,
                     "image": whole},
             "text": {"place": whole, "target": whole, "weight": real}}
    self.columns = {f"{buffer}_{name}": [x] for buffer, columns in empty.items()
                    for name, x in columns.items()}
    self._sizes = dict.fromkeys(("und", "gen", "vit", "text"), 0)
    self._index = self._split = self._image = self.position = 0
    self.images = []

  def text(self, split: TextSplit):
    vocab_size = self._config.llm.vocab_size
    if split.ids and not 0 <= min(split.ids) <= max(split.ids) < vocab_size:
      raise ValueError(f"text ids from {min(split.ids)} to {max(split.ids)} do not fit the "
                       f"vocabulary of {vocab_size}: tokenize with the checkpoint's tokenizer")
    n = len(split.ids) + 1  # tokens with a next one
    ids = [self._special.text_start, *split.ids, self._special.text_end]
    if split.need_loss:
      self._append("text", n, place=self._sizes["und"] + np.arange(n), target=ids[1:],
                   weight=n**-0.5 if self._reweighting else 1.0)
    self._tokens("und", n + 1, CAUSAL, step=1, ids=ids, vit=-1)
    self.position += n + 1
    self._split += 1

  def latents(self, split: ImageSplit, kind):
    rows, columns, latents_GC = _flat(split.latents, "latents", self._config.latent_dim)
    place = images.position_ids(rows, columns, self._config.max_latent_size)
    if split.pixels is not None:
      self.images.append((self._sizes["gen"], split.pixels))
    self._framed("gen", len(place), kind, latents=latents_GC, place=place, image=self._image,
                 weight=float(kind == NOISE))

  def vit(self, patches_YXC):
    rows, columns, patches_PC = _flat(patches_YXC, "vit_patches", self._patch_dim)
    if patches_PC.dtype != np.uint8:
      patches_PC = patches_PC.astype(np.float32)
    n, first = rows * columns, self._sizes["vit"]
    if first and self.columns["vit_patches"][-1].dtype != patches_PC.dtype:
      raise ValueError("vit_patches of a sample must be all 8-bit levels or all float pixels")
    place = images.position_ids(rows, columns, self._config.vit.grid_size)
    self._append("vit", n, patches=patches_PC, position=place, image=self._image)
    self._framed("und", n, FULL, ids=0, vit=first + np.arange(n))

  def _framed(self, buffer, n, kind, **columns):
    """A split of n tokens between the start and the end of an image, all at one position."""
    self._tokens("und", 1, kind, ids=self._special.image_start, vit=-1)
    self._tokens(buffer, n, kind, **columns)
    self._tokens("und", 1, kind, ids=self._special.image_end, vit=-1)
    self.position += kind != NOISE
    self._image += 1
    self._split += 1

  def _tokens(self, buffer, n, kind, step=0, **columns):
    self._append(buffer, n, position=self.position + step * np.arange(n),
                 index=self._index + np.arange(n), split=self._split, kind=kind, **columns)
    self._index += n

  def _append(self, buffer, n, **columns):
    for name, values in columns.items():
      column, values = self.columns[f"{buffer}_{name}"], np.asarray(values)
      if name != "patches":  # these may be 8-bit levels
        values = values.astype(column[0].dtype)
      column.append(values if values.ndim else np.full(n, values))
    self._sizes[buffer] += n


def _flat(grid_YXC, name, channels):
  """Rows, columns, and the tokens [P, C] of a grid."""
  shape = None if grid_YXC is None else np.shape(grid_YXC)
  if shape is None or len(shape) != 3 or shape[-1] != channels:
    raise ValueError(f"an image's {name} must be [rows, columns, {channels}] for its roles, but "
                     f"it has shape {shape}")
  return *shape[:2], einops.rearrange(grid_YXC, "y x c -> (y x) c")
