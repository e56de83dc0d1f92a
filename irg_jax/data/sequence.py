"""A training sample as a list of splits, and what each split turns into (spec section 3)."""

import dataclasses

import numpy as np

from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.images import position_ids
from irg_jax.tokens import CAUSAL, FULL, NOISE


@dataclasses.dataclass(frozen=True)
class TextSplit:
  """`<|im_start|> ids <|im_end|>`; predicted if `need_loss`."""

  ids: list[int]
  need_loss: bool = False


@dataclasses.dataclass(frozen=True)
class ImageSplit:
  """One image in up to three roles; each role that it has becomes a split of its own.

  Attributes:
    latents: float [h, w, latent_dim], clean latent tokens; None if only the ViT sees it.
    vit_patches: [rows, columns, patch * patch * 3], 8-bit levels as uint8, or float pixels in
      [-1, 1]; None if the ViT does not see it.
    need_loss: it is a target (noised split).
    need_vae, need_vit: it is a condition (clean VAE split, ViT split).
    pixels: uint8 [H, W, 3] of an image that is not encoded yet. `latents` are then the
      standard normal draw of its posterior, see `latents.encode_images`.
  """

  latents: np.ndarray | None
  vit_patches: np.ndarray | None
  need_loss: bool = False
  need_vae: bool = False
  need_vit: bool = False
  pixels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class DroppedImage:
  """A condition image that conditioning dropout took away: its position stays used."""


def sample_features(splits, config: ModelConfig, special: SpecialTokens, *, mode: int = 0,
                    index: int = 0, ce_loss_reweighting: bool = False) -> dict:
  """Lays a sample out as flat arrays, ready to be concatenated with other samples.

  Args:
    splits: list of TextSplit, ImageSplit and DroppedImage.
    mode, index: what the sample is known by: mode id and record number.
    ce_loss_reweighting: weighs each predicted token by 1 / sqrt(predicted tokens of its
      split) instead of 1 (spec section 4).

  Returns:
    dict of numpy arrays. With U und tokens, G latent tokens, P patches and L predicted
    tokens, int32 unless it says otherwise:
      und_ids, und_vit [U] (`und_vit` indexes the patches, -1: a text token);
      und_position, und_index, und_split, und_kind [U], gen_* [G]: rotary positions and
        `attention.Tokens` fields;
      gen_latents float32 [G, latent_dim], gen_place, gen_image [G], gen_weight float32 [G]
        (1 on noised tokens, the targets);
      vit_patches [P, patch * patch * 3] (uint8 or float32, as given), vit_position,
        vit_image [P];
      text_place [L] (index in und of the token that predicts), text_target [L] (the token
        that it predicts), text_weight float32 [L];
      sample_mode, sample_index [1];
    and `images`, a list of (first token in gen, uint8 [H, W, 3]): those to be encoded yet.

  Raises:
    ValueError: ids beyond the vocabulary; an image without the arrays that its roles need, or
      with more latent tokens or patches a side than the model has positions for.
  """
  layout = _Layout(config, special, ce_loss_reweighting)
  for split in splits:
    if isinstance(split, TextSplit):
      layout.text(split)
    elif isinstance(split, DroppedImage):
      layout.dropped()
    else:
      if split.need_loss:
        layout.latents(split, NOISE)
      if split.need_vae:
        layout.latents(split, FULL)
      if split.need_vit:
        layout.vit(split.vit_patches)
  return layout.arrays() | {"sample_mode": np.array([mode], np.int32),
                            "sample_index": np.array([index], np.int32),
                            "images": layout.images}


class _Layout:
  """The arrays of one sample while they grow."""

  def __init__(self, config, special, reweighting):
    self._config, self._special, self._reweighting = config, special, reweighting
    # Lists of dicts of equally long columns, and how many values each holds.
    self._columns = {"und": [], "gen": [], "vit": [], "text": []}
    self._sizes = dict.fromkeys(self._columns, 0)
    self._index = self._split = self._position = self._image = 0
    self.images = []

  def text(self, split: TextSplit):
    vocab_size = self._config.llm.vocab_size
    if split.ids and not 0 <= min(split.ids) <= max(split.ids) < vocab_size:
      raise ValueError(f"text ids from {min(split.ids)} to {max(split.ids)} do not fit the "
                       f"vocabulary of {vocab_size}: tokenize with the checkpoint's tokenizer")
    n = len(split.ids) + 1  # positions with a next token
    ids = [self._special.text_start, *split.ids, self._special.text_end]
    if split.need_loss:
      self._append("text", n, place=self._sizes["und"] + np.arange(n), target=ids[1:],
                   weight=n**-0.5 if self._reweighting else 1.0)
    self._tokens("und", n + 1, CAUSAL, self._position + np.arange(n + 1), ids=ids, vit=-1)
    self._position += n + 1
    self._split += 1

  def latents(self, split: ImageSplit, kind):
    rows, columns, dim = _check_grid(split.latents, "latents", self._config.latent_dim)
    place = position_ids(rows, columns, self._config.max_latent_size)
    if split.pixels is not None:
      self.images.append((self._sizes["gen"], split.pixels))
    self._boundary(self._special.image_start, kind)
    self._tokens(
        "gen", rows * columns, kind, self._position, latents=split.latents.reshape(-1, dim),
        place=place, image=self._image, weight=float(kind == NOISE))
    self._boundary(self._special.image_end, kind)
    self._end_image(advance=kind != NOISE)

  def vit(self, patches):
    rows, columns, dim = _check_grid(patches, "vit_patches", self._config.vit.patch_size**2 * 3)
    before = self._columns["vit"]
    if before and (before[0]["patches"].dtype == np.uint8) != (patches.dtype == np.uint8):
      raise ValueError("vit_patches of a sample must be all 8-bit levels or all float pixels")
    n, place = rows * columns, position_ids(rows, columns, self._config.vit.grid_size)
    self._boundary(self._special.image_start, FULL)
    self._tokens("und", n, FULL, self._position, ids=0, vit=self._sizes["vit"] + np.arange(n))
    self._boundary(self._special.image_end, FULL)
    self._append("vit", n, patches=patches.reshape(-1, dim), position=place,
                 image=self._image)
    self._end_image(advance=True)

  def dropped(self):
    self._position += 1

  def _boundary(self, token, kind):
    self._tokens("und", 1, kind, self._position, ids=token, vit=-1)

  def _end_image(self, advance):
    self._position += advance
    self._image += 1
    self._split += 1

  def _tokens(self, buffer, n, kind, position, **columns):
    self._append(buffer, n, position=position, index=self._index + np.arange(n),
                 split=self._split, kind=kind, **columns)
    self._index += n

  def _append(self, buffer, n, **columns):
    full = lambda x: x if np.ndim(x) else np.full(n, x)
    self._columns[buffer].append({name: np.asarray(full(x)) for name, x in columns.items()})
    self._sizes[buffer] += n

  def arrays(self):
    c = self._config
    tokens = dict(position=(0,), index=(0,), split=(0,), kind=(0,))
    empty = {
        "und": dict(ids=(0,), vit=(0,), **tokens),
        "gen": dict(latents=(0, c.latent_dim), place=(0,), image=(0,), weight=(0,), **tokens),
        "vit": dict(patches=(0, c.vit.patch_size**2 * 3), position=(0,), image=(0,)),
        "text": dict(place=(0,), target=(0,), weight=(0,)),
    }
    out = {}
    for prefix, parts in self._columns.items():
      for name, shape in empty[prefix].items():
        values = np.concatenate([part[name] for part in parts] or [np.zeros(shape, np.uint8)])
        if not (name == "patches" and values.dtype == np.uint8):
          real = name in ("latents", "patches", "weight")
          values = values.astype(np.float32 if real else np.int32)
        out[f"{prefix}_{name}"] = values
    return out


def _check_grid(tokens, name, dim):
  shape = None if tokens is None else np.shape(tokens)
  if shape is None or len(shape) != 3 or shape[-1] != dim:
    raise ValueError(f"an image's {name} must be [rows, columns, {dim}] for its roles, "
                     f"but it has shape {shape}")
  return shape
