"""Time of a training step, optimizer included, relative to a matrix product.

  python benchmarks/train.py
  python benchmarks/train.py --rows 4 --repeat 10

Random weights of `configs/bench.py`, float32. The batch is two improving_full samples (texts of
60, 150 and 200 tokens, an image of 256 pixels as VAE latents and 252 as ViT patches, a target
of 256) and two initial_full samples (60 and 150, a target of 256): 3460 tokens without padding.
Prints the fastest step, the rate of a 2048-cubed matrix product timed between the steps, and
the rate of the step's own products as a share of it.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax import config as config_lib
from irg_jax import sharding
from irg_jax.config import SpecialTokens
from irg_jax.data.batch import LENGTH_FEATURES, BufferSizes, pack_row, stack_rows
from irg_jax.data.records import MODES
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train import settings as settings_lib
from irg_jax.train.settings import Switches
from irg_jax.train.step import (init_state, make_optimizer, make_train_step, token_counts,
                                unit_flops)
from irg_jax.weights.init import random_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENS = 3460
# Samples of each row, by the number of rows. Two rows are of equal length: no padding.
LAYOUTS = {1: [[0, 1, 2, 3]], 2: [[0, 2], [1, 3]], 4: [[0], [1], [2], [3]]}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", type=int, choices=sorted(LAYOUTS), default=2)
  parser.add_argument("--repeat", type=int, default=5)
  parser.add_argument("--attention", default="auto", help='"auto", "dense" or "chunked"')
  args = parser.parse_args()

  config = config_lib.read_model(ROOT / "configs" / "bench.py")
  settings = settings_lib.load(f"{ROOT}/configs/irgl.py:tiny", ["data.path=none"])
  batch = make_batch(config, LAYOUTS[args.rows])
  assert (batch.tokens.sample >= 0).sum() == TOKENS
  model = UnifiedTransformer(dataclasses.replace(config, attention=args.attention))
  optimizer = make_optimizer(settings.optimizer, settings.stage2)
  state = init_state(random_params(config, jax.random.key(0))["transformer"], optimizer)
  mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
  state = jax.device_put(state, sharding.parameter_shardings(state, mesh))
  step = make_train_step(model, optimizer, settings, mesh, state, batch)

  seconds, rates, key = [], [], jax.random.key(1)
  for i in range(args.repeat + 1):
    start = time.perf_counter()
    state, metrics = step(Switches(), state, batch, key)
    loss = float(metrics["loss"])
    jax.block_until_ready(state)
    if i:  # the first step compiles
      seconds.append(time.perf_counter() - start)
      rates.append(matmul_rate())
    else:
      print(f"compiled in {time.perf_counter() - start:.0f} s; loss {loss:.3f}")
  report(config, batch, seconds, rates)


def make_batch(config, layout, latents: int = 16, patches: int = 18):
  """The four samples, the first two improving_full, packed into rows; padding only at the end.

  Images have `latents` latent tokens and `patches` ViT patches along each side.
  """
  vocab = config.llm.vocab_size
  special = SpecialTokens(text_start=vocab - 4, text_end=vocab - 3, image_start=vocab - 2,
                          image_end=vocab - 1)
  rng = np.random.default_rng(0)
  text = lambda n, **kw: TextSplit(rng.integers(0, vocab - 4, n).tolist(), **kw)
  def image(**roles):
    vit = rng.uniform(-1, 1, (patches, patches, config.vit.patch_size**2 * 3)).astype(np.float32)
    return ImageSplit(rng.standard_normal((latents, latents, config.latent_dim), np.float32), vit,
                      **roles)
  target = lambda: image(need_loss=True)
  improving = lambda: [text(60), text(150), image(need_vae=True, need_vit=True),
                       text(200, need_loss=True), target()]
  initial = lambda: [text(60), text(150, need_loss=True), target()]
  samples = [sample_features(splits(), config, special, mode=MODES.index(mode))
             for mode, splits in 2 * [("improving_full_learning", improving)]
             + 2 * [("initial_full_learning", initial)]]
  longest = lambda name: max(sum(len(samples[i][name]) for i in row) for row in layout)
  sizes = BufferSizes(**{buffer: longest(name) for buffer, name in LENGTH_FEATURES.items()})
  batch = stack_rows([pack_row([samples[i] for i in row], sizes) for row in layout])
  return jax.tree.map(jnp.asarray, batch)


def needed_flops(config, batch):
  """FLOPs of a step by part, with the backward pass, without padding and invisible pairs."""
  used = token_counts(batch)
  return {name: 3 * float(used[name]) * flops
          for name, flops in unit_flops(config).items()}


def matmul_rate(size=2048, repeat=3):
  """FLOP/s of a square float32 matrix product, best of `repeat`."""
  x = jnp.ones((size, size))
  product = jax.jit(jnp.dot)
  product(x, x).block_until_ready()
  best = np.inf
  for _ in range(repeat):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def report(config, batch, seconds, rates):
  rate, best = max(rates), min(seconds)
  needed = needed_flops(config, batch)
  print(f"{jax.devices()[0].device_kind}; 2048-cubed matrix product {rate / 1e9:.0f} GFLOP/s "
        f"({', '.join(f'{r / 1e9:.0f}' for r in rates)})")
  print(f"rows {len(batch.position)} of {batch.position.shape[1]} tokens; steps of "
        f"{', '.join(f'{s:.2f}' for s in seconds)} s")
  parts = ", ".join(f"{name} {x / 1e9:.0f}" for name, x in needed.items())
  total = sum(needed.values())
  print(f"needed: {total / 1e9:.0f} GFLOP ({parts})")
  print(f"a step: {best:.2f} s, or {best * rate / 1e9:.0f} GFLOP of matrix product time; "
        f"the needed products run at {total / best / rate:.2f} of that rate")


if __name__ == "__main__":
  main()
