"""The packed batch: several samples a row, in the two buffers of the decoder."""

import dataclasses

import jax
import numpy as np

from irg_jax.model.attention import PADDING, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """B rows of U understanding tokens, G latent tokens and P ViT patches.

  Attributes:
    tokens, position: Tokens and int32 rotary positions of [und | gen], [B, U + G].
    text_ids: int32 [B, U]; ignored where `vit_index` >= 0.
    vit_index: int32 [B, U], the patch whose ViT embedding stands here, or -1.
    text_target: int32 [B, U], the next token.
    text_weight: float32 [B, U], 1 where the next token is predicted, else 0.
    latents: float32 [B, G, latent_dim], clean latents.
    latent_position: int32 [B, G], `row * max_latent_size + column`.
    latent_picture: int32 [B, G], number of the picture in the row (one flow time for each).
    latent_weight: float32 [B, G], 1 on noised tokens (targets), else 0.
    vit_patches, vit_position, vit_picture: see `model.vit.Vit`, [B, P, ...].
  """

  tokens: Tokens
  position: jax.Array
  text_ids: jax.Array
  vit_index: jax.Array
  text_target: jax.Array
  text_weight: jax.Array
  latents: jax.Array
  latent_position: jax.Array
  latent_picture: jax.Array
  latent_weight: jax.Array
  vit_patches: jax.Array
  vit_position: jax.Array
  vit_picture: jax.Array


def pack_row(samples, und_size: int, gen_size: int, vit_size: int) -> Batch:
  """Packs samples (from `sequence.sample_features`) into one row, a Batch without its B axis.

  Raises:
    ValueError: no sample, or samples that do not fit the buffers.
  """
  if not samples:
    raise ValueError("a row needs at least one sample")
  row = {name: [] for name in samples[0]} | {"und_sample": [], "gen_sample": []}
  patches = pictures = 0
  for number, sample in enumerate(samples):
    sample = dict(sample)
    sample["und_vit"] = np.where(sample["und_vit"] >= 0, sample["und_vit"] + patches, -1)
    # Pictures are numbered through the row: the same number must not mean two pictures.
    sample["gen_picture"] = sample["gen_picture"] + pictures
    sample["vit_picture"] = sample["vit_picture"] + pictures
    pictures = max([pictures, *(sample["gen_picture"] + 1), *(sample["vit_picture"] + 1)])
    patches += len(sample["vit_position"])
    for prefix in ("und", "gen"):
      sample[f"{prefix}_sample"] = np.full(len(sample[f"{prefix}_index"]), number, np.int32)
    for name, values in sample.items():
      row[name].append(values)

  sizes = {"und": und_size, "gen": gen_size, "vit": vit_size}
  fill = {"und_sample": PADDING, "gen_sample": PADDING, "und_vit": -1, "vit_picture": PADDING,
          "gen_picture": PADDING}
  row = {name: _fit(np.concatenate(parts), sizes[name[:3]], fill.get(name, 0), name)
         for name, parts in row.items()}
  both = lambda name: np.concatenate([row[f"und_{name}"], row[f"gen_{name}"]]).astype(np.int32)
  return Batch(
      tokens=Tokens(**{name: both(name) for name in ("sample", "index", "split", "kind")}),
      position=both("position"), text_ids=row["und_ids"], vit_index=row["und_vit"],
      text_target=row["und_target"], text_weight=row["und_weight"], latents=row["gen_latents"],
      latent_position=row["gen_place"], latent_picture=row["gen_picture"],
      latent_weight=row["gen_weight"], vit_patches=row["vit_patches"],
      vit_position=row["vit_position"], vit_picture=row["vit_picture"])


def stack_rows(rows) -> Batch:
  """Rows of equal sizes -> one Batch."""
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def _fit(values, size, fill, name):
  if len(values) > size:
    raise ValueError(f"the samples of a row have {len(values)} values of {name}, "
                     f"but the buffer holds {size}: pack fewer samples, or enlarge the buffer")
  return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1),
                constant_values=fill)
