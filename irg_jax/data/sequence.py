"""A training sample as a list of splits, and what each split turns into (spec section 3)."""

import dataclasses

import numpy as np

from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.images import position_ids
from irg_jax.model.attention import CAUSAL, FULL, NOISE


@dataclasses.dataclass(frozen=True)
class TextSplit:
  """`<|im_start|> ids <|im_end|>`; predicted if `need_loss`."""

  ids: list[int]
  need_loss: bool = False


@dataclasses.dataclass(frozen=True)
class PictureSplit:
  """One picture in up to three roles; each role that it has becomes a split of its own.

  Attributes:
    latents: float [h, w, latent_dim], clean latent tokens; None if only the ViT sees it.
    vit_patches: float [rows, columns, patch * patch * 3]; None if the ViT does not see it.
    need_loss: it is a target (noised split).
    need_vae, need_vit: it is a condition (clean VAE split, ViT split).
  """

  latents: np.ndarray | None
  vit_patches: np.ndarray | None
  need_loss: bool = False
  need_vae: bool = False
  need_vit: bool = False


def sample_features(splits, config: ModelConfig, special: SpecialTokens) -> dict:
  """Lays a sample out as flat arrays, ready to be concatenated with other samples.

  Returns:
    dict of numpy arrays. With U und tokens, G latent tokens and P patches:
      und_ids, und_target, und_vit [U] int32 (`und_vit` indexes the patches, -1: a text token;
        `und_target` is the next token where there is a loss), und_weight [U] float32 (0 or 1);
      und_position, und_index, und_split, und_kind [U], gen_* [G]: rotary positions and
        `attention.Tokens` fields;
      gen_latents [G, latent_dim], gen_place, gen_picture [G], gen_weight [G] float32 (1 on
        noised tokens, the targets);
      vit_patches [P, patch * patch * 3], vit_position, vit_picture [P].

  Raises:
    ValueError: ids beyond the vocabulary; a picture without the arrays that its roles need, or
      with more latent tokens or patches a side than the model has positions for.
  """
  layout = _Layout(config, special)
  for split in splits:
    if isinstance(split, TextSplit):
      layout.text(split)
    else:
      if split.need_loss:
        layout.latents(split.latents, NOISE)
      if split.need_vae:
        layout.latents(split.latents, FULL)
      if split.need_vit:
        layout.vit(split.vit_patches)
  return layout.arrays()


class _Layout:
  """The arrays of one sample while they grow."""

  def __init__(self, config, special):
    self._config, self._special = config, special
    self._und, self._gen, self._vit = [], [], []  # lists of dicts of equally long columns
    self._index = self._split = self._position = self._pictures = self._patches = 0

  def text(self, split: TextSplit):
    vocab_size = self._config.llm.vocab_size
    if split.ids and not 0 <= min(split.ids) <= max(split.ids) < vocab_size:
      raise ValueError(f"text ids from {min(split.ids)} to {max(split.ids)} do not fit the "
                       f"vocabulary of {vocab_size}: tokenize with the checkpoint's tokenizer")
    n = len(split.ids) + 1  # positions with a next token
    ids = [self._special.text_start, *split.ids, self._special.text_end]
    self._tokens(
        self._und, n + 1, CAUSAL, self._position + np.arange(n + 1), ids=ids,
        target=[*ids[1:], 0], weight=[float(split.need_loss)] * n + [0.0], vit=-1)
    self._position += n + 1
    self._split += 1

  def latents(self, latents, kind):
    rows, columns, dim = _check_grid(latents, "latents", self._config.latent_dim)
    place = position_ids(rows, columns, self._config.max_latent_size)
    self._boundary(self._special.image_start, kind)
    self._tokens(
        self._gen, rows * columns, kind, self._position, latents=latents.reshape(-1, dim),
        place=place, picture=self._pictures, weight=float(kind == NOISE))
    self._boundary(self._special.image_end, kind)
    self._end_picture(advance=kind != NOISE)

  def vit(self, patches):
    rows, columns, dim = _check_grid(patches, "vit_patches", self._config.vit.patch_size**2 * 3)
    n, place = rows * columns, position_ids(rows, columns, self._config.vit.grid_size)
    self._vit.append(dict(patches=patches.reshape(-1, dim), position=place,
                          picture=np.full(n, self._pictures)))
    self._boundary(self._special.image_start, FULL)
    self._tokens(self._und, n, FULL, self._position, ids=0, target=0, weight=0.0,
                 vit=self._patches + np.arange(n))
    self._patches += n
    self._boundary(self._special.image_end, FULL)
    self._end_picture(advance=True)

  def _boundary(self, token, kind):
    self._tokens(self._und, 1, kind, self._position, ids=token, target=0, weight=0.0, vit=-1)

  def _end_picture(self, advance):
    self._position += advance
    self._pictures += 1
    self._split += 1

  def _tokens(self, buffer, n, kind, position, **columns):
    columns |= dict(position=position, index=self._index + np.arange(n), split=self._split,
                    kind=kind)
    full = lambda x: x if np.ndim(x) else np.full(n, x)
    buffer.append({name: np.asarray(full(x)) for name, x in columns.items()})
    self._index += n

  def arrays(self):
    c = self._config
    empty = {
        "und": dict(ids=(0,), target=(0,), vit=(0,), weight=(0,)),
        "gen": dict(latents=(0, c.latent_dim), place=(0,), picture=(0,), weight=(0,)),
        "vit": dict(patches=(0, c.vit.patch_size**2 * 3), position=(0,), picture=(0,)),
    }
    for name in ("und", "gen"):
      empty[name] |= dict(position=(0,), index=(0,), split=(0,), kind=(0,))
    out = {}
    for prefix, parts in (("und", self._und), ("gen", self._gen), ("vit", self._vit)):
      for name, shape in empty[prefix].items():
        values = [part[name] for part in parts] or [np.zeros(shape)]
        dtype = np.float32 if name in ("latents", "patches", "weight") else np.int32
        out[f"{prefix}_{name}"] = np.concatenate(values).astype(dtype)
    return out


def _check_grid(tokens, name, dim):
  shape = None if tokens is None else np.shape(tokens)
  if shape is None or len(shape) != 3 or shape[-1] != dim:
    raise ValueError(f"a picture's {name} must be [rows, columns, {dim}] for its roles, "
                     f"but it has shape {shape}")
  return shape
