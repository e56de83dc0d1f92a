"""Seconds and rates of two-round generation, phase by phase, against a matrix product.

  python benchmarks/generate.py
  python benchmarks/generate.py --batch 4 --repeat 3

Random weights of `configs/bench.py`, float32. For each batch size it prints, after warm-up,
the best of the repeats: seconds and analytic FLOPs by phase, their rate as a share of a
2048-cubed matrix product timed in the same run, and how many compilations six more
prompts of different lengths cause. FLOPs are those that a phase needs (visible keys only), not
those that the program computes.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax import config as config_lib
from irg_jax import flow
from irg_jax.config import SpecialTokens
from irg_jax.generate import irg
from irg_jax.generate.settings import Settings
from irg_jax.images import ImageTransform
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.model.vae import Vae
from irg_jax.weights.init import random_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
SYSTEM, PROMPT, THOUGHT = 200, 60, 63  # tokens of text
SETTINGS = Settings(
    rounds=2, height=256, width=256, steps=25, think_limit=THOUGHT + 1, max_prompt_tokens=PROMPT,
    vae_transform=ImageTransform(1024, 256, 16))


@dataclasses.dataclass(frozen=True)
class IdTokenizer:
  """Texts are tuples of ids, so that lengths are exact."""

  special: SpecialTokens

  def encode(self, text):
    return list(text)

  def decode(self, ids):
    return tuple(ids)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes")
  parser.add_argument("--repeat", type=int, default=3)
  args = parser.parse_args()

  config = config_lib.read_model(ROOT / "configs" / "bench.py")
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
  params = random_params(config, jax.random.key(0))
  flops = phase_flops(config)
  for batch in args.batch:
    generate(config, params, batch, PROMPT)
    runs = [(generate(config, params, batch, PROMPT), matmul_rate()) for _ in range(args.repeat)]
    seconds, rate = min(runs, key=lambda run: sum(run[0].values()))
    report(batch, seconds, rate, flops)
    before = len(compiled)
    for length in (1, 5, 17, 30, 45, 60):
      generate(config, params, batch, length)
    print(f"compilations: {before} up to here, {len(compiled) - before} for six prompts more\n")


def generate(config, params, batch, prompt_length):
  """Runs one batch; seconds by phase."""
  vocab = config.llm.vocab_size
  special = SpecialTokens(text_start=vocab - 4, text_end=vocab - 3, image_start=vocab - 2,
                          image_end=vocab - 1)
  rng = np.random.default_rng(0)
  ids = lambda n: tuple(int(i) for i in rng.integers(0, vocab - 4, n))
  system, prompts = ids(SYSTEM), [ids(prompt_length) for _ in range(batch)]
  start = time.perf_counter()
  rows = irg.generate(UnifiedTransformer(config), params, IdTokenizer(special), prompts,
                      seeds=list(range(batch)), settings=SETTINGS, system_prompt=system)
  total = time.perf_counter() - start
  seconds = {f"{name} {number}": value for number, result in enumerate(rows[0].rounds, 1)
             for name, value in result.seconds.items()}
  return {"prefill": total - sum(seconds.values())} | seconds


def phase_flops(config):
  """Analytic FLOPs of one row by phase; the VAE's as XLA counts them."""
  s, llm = SETTINGS, config.llm
  P = (s.height // 16) * (s.width // 16)
  vit_side = s.vit_transform.size(s.width, s.height)[0] // config.vit.patch_size
  system, prompt, thought, vit = SYSTEM + 2, PROMPT + 2, THOUGHT + 2, vit_side**2 + 2
  text1 = system + prompt + thought
  full = {1: text1, 2: text1 + P + 2 + vit + thought}
  views = {1: [full[1], system], 2: [full[2], full[2] - thought, text1 + thought]}
  times = flow.schedule(s.steps, s.timestep_shift)[:-1]
  out = {"prefill": decoder(llm, system + prompt, 0)}
  for number, guidance in ((1, s.first), (2, s.later)):
    low, high = guidance.interval
    guided = int(np.sum((low < times) & (times <= high)))
    ends = 4 * P * llm.hidden_size * config.latent_dim
    velocity = lambda keys: decoder(llm, P + 2, keys, causal=False) + ends
    out[f"draw {number}"] = (guided * sum(map(velocity, views[number]))
                             + (len(times) - guided) * velocity(full[number]))
    before = full[number] - thought
    words = sum(decoder(llm, 1, before + i) for i in range(THOUGHT))
    words += 2 * THOUGHT * llm.hidden_size * llm.vocab_size
    out[f"think {number}"] = words + number * decoder(llm, thought, before)
    out[f"decode {number}"] = vae_flops(config, "decode")
  v = config.vit
  vit_layer = 8 * v.hidden_size**2 + 4 * v.hidden_size * v.mlp_size + 4 * vit * v.hidden_size
  out["encode 1"] = (vae_flops(config, "encode") + v.num_layers * vit * vit_layer
                     + decoder(llm, P + 2, full[1], causal=False)
                     + decoder(llm, vit, full[1] + P + 2, causal=False))
  return out


def decoder(llm, tokens, cached, causal=True):
  """FLOPs of `tokens` new tokens that see `cached` ones and themselves."""
  width, kv = llm.hidden_size, llm.num_kv_heads * llm.head_dim
  linear = 2 * (2 * width * width + 2 * width * kv + 3 * width * llm.mlp_size)
  keys = cached + (tokens + 1) / 2 if causal else cached + tokens
  return llm.num_layers * tokens * (linear + 4 * width * keys)


def vae_flops(config, method):
  shape = {"encode": (1, SETTINGS.height, SETTINGS.width, 3),
           "decode": (1, SETTINGS.height // 8, SETTINGS.width // 8, config.vae.z_channels)}[method]
  vae = Vae(config.vae)
  params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  run = lambda params, x: vae.apply(params, x, method=method)
  lowered = jax.jit(run).lower(params, jax.ShapeDtypeStruct(shape, jnp.float32))
  return lowered.cost_analysis()["flops"]


def matmul_rate(size=2048, repeat=10):
  """FLOP/s of a square float32 matrix product, best of `repeat`."""
  x = jnp.ones((size, size))
  product = jax.jit(jnp.dot)
  product(x, x).block_until_ready()
  best = min(_seconds(lambda: product(x, x)) for _ in range(repeat))
  return 2 * size**3 / best


def _seconds(run):
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def report(batch, seconds, rate, flops):
  print(f"batch {batch}, {jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"2048-cubed matrix product {rate / 1e9:.0f} GFLOP/s")
  print(f"{'phase':10} {'seconds':>8} {'GFLOP':>8} {'of matmul rate':>15}")
  groups = {name: [name] for name in seconds} | {
      "flow": ["draw 1", "draw 2"], "all": list(seconds)}
  for name, parts in groups.items():
    spent = sum(seconds[p] for p in parts)
    needed = batch * sum(flops.get(p, 0.0) for p in parts)
    print(f"{name:10} {spent:8.2f} {needed / 1e9:8.1f} {needed / spent / rate:15.2f}")
  total = sum(seconds.values())
  print(f"an image pair: {total / batch:.2f} s, or {total / batch * rate / 1e9:.0f} GFLOP of "
        "matmul time")


if __name__ == "__main__":
  main()
