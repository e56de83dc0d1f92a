"""The two fixed position tables that the published layout stores beside the parameters.

The model computes the same numbers from positions, so they are checked on load, computed
anew on export, and never trained.
"""

import ml_dtypes
import numpy as np

from irg_jax.config import ModelConfig
from irg_jax.weights.errors import CheckpointError
from irg_jax.weights.tensors import Tensor

TOLERANCE = 1e-5  # what float32 sines of other libraries may differ by


def table_grids(config: ModelConfig) -> dict[str, int]:
  """Published keys of the tables and the side of their grid."""
  return {"latent_pos_embed.pos_embed": config.max_latent_size,
          "vit_pos_embed.pos_embed": config.vit.grid_size}


def sincos_table(width: int, grid: int) -> np.ndarray:
  """Fixed 2-D position table, float32 [grid * grid, width], row-major over the grid.

  The first half of the width encodes the column, the second half the row; each half is sines,
  then cosines, base 10000 (spec section 2). Rounded once, from float64.
  """
  frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
  angle = np.arange(grid, dtype=np.float64)[:, None] * frequency
  line = np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)
  table = np.empty((grid, grid, width), np.float32)
  table[..., :width // 2] = line[None, :]
  table[..., width // 2:] = line[:, None]
  return table.reshape(grid * grid, width)


def check_table(tensor: Tensor, grid: int) -> None:
  """Refuses a stored table that is not the computed one, up to rounding to its dtype.

  Raises:
    CheckpointError: names the file, the key and the first row that differs.
  """
  want = sincos_table(tensor.shape[1], grid).astype(tensor.dtype).astype(np.float32)
  got = np.empty(tensor.shape, np.float32)
  tensor.read_into(got)
  within = np.abs(got - want) <= TOLERANCE + float(ml_dtypes.finfo(tensor.dtype).eps) * abs(want)
  if not within.all():
    row = int(np.argmin(within.all(axis=1)))
    raise CheckpointError(
        f"{tensor.path}: {tensor.key} is not the fixed sin-cos table of a {grid} x {grid} grid "
        f"(first at row {row}); this model computes the table and cannot use another one")
