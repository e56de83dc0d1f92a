"""Random parameters, for tests, benchmarks and training from nothing."""

import math
import re
import tempfile
import zlib

import jax
import numpy as np

from irg_jax.config import ModelConfig
from irg_jax.tokenizer import CONTROL_NAMES, write_byte_tokenizer
from irg_jax.weights import names, published
from irg_jax.weights.names import CheckpointError

# Kernels whose output is added to the residual stream.
_RESIDUAL = re.compile(r"/layers/(.*/)?(o|down|fc2)/kernel$")
BYTE_TOKENS = 256 + len(CONTROL_NAMES)


def random_params(config: ModelConfig, key) -> dict:
  """Samples parameters of the shapes of `names.abstract_params`, in `config.param_dtype`.

  Kernels are normal with variance 1 / fan-in; those that add to the residual stream are divided
  by the square root of their number. Embeddings are normal with variance 1, so that the token
  outweighs what untrained layers add to it. Norm scales are one, biases zero. Sampled on the
  host, so nothing is compiled. `key` is of `jax.random.key`.
  """
  seed = np.asarray(jax.random.key_data(key)).tolist()
  dtype = np.dtype(config.param_dtype)
  return names.unflatten({
      r.path: jax.numpy.asarray(_sample(r, seed, dtype)) for r in names.rows(config)})


def write_random_checkpoint(folder, config: ModelConfig, seed: int) -> None:
  """Writes random parameters in the published layout with a byte-level tokenizer.

  Raises CheckpointError for a vocabulary too small for the tokenizer, FileExistsError for a
  folder that is not empty.
  """
  if config.llm.vocab_size < BYTE_TOKENS:
    raise CheckpointError(f"llm.vocab_size is {config.llm.vocab_size}; the byte-level tokenizer "
                          f"needs at least {BYTE_TOKENS}")
  with tempfile.TemporaryDirectory() as source:
    write_byte_tokenizer(source)
    params = random_params(config, jax.random.key(seed))
    published.save(folder, params, config, source=source)


def _sample(row, seed, dtype):
  name = row.path.rsplit("/", 1)[-1]
  if name in ("scale", "bias"):
    return np.full(row.shape, name == "scale", dtype)
  # The seed depends on the path, not on the order of the table.
  rng = np.random.default_rng([*seed, zlib.crc32(row.path.encode())])
  std = 1.0 if name == "embedding" else math.prod(row.layer_shape[:-1])**-0.5
  if _RESIDUAL.search(row.path):
    std *= (2 * row.layers)**-0.5
  return (rng.standard_normal(row.shape, np.float32) * np.float32(std)).astype(dtype)
