"""Kernels, attention, generation and training timed on one accelerator, in under ten minutes.

  python benchmarks/device.py
  python benchmarks/device.py --parts attention,think --layers 14
  python benchmarks/device.py --small    # tiny sizes, to try it on a CPU

First it compares the compiled kernels of attention with the dense form. Then it times attention,
a training step, and `think` and `denoise` in the shapes of the 7B model, with random bfloat16
weights. It prints the tables and writes them as JSON after each part. What fails, for example for
want of memory, is a row with the reason. The exit status is 1 if a kernel is out of tolerance or
could not be compared. docs/measurements.md explains the rows.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import train as train_benchmark
from device_arrays import arrays, cached_arrays, full_context, normal, random_weights
from device_report import Run

from irg_jax import config as config_lib
from irg_jax import flow, sharding, storage
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.generate import steps
from irg_jax.generate.context import VIEWS
from irg_jax.generate.settings import Sampling, Settings
from irg_jax.model.attention import KeyValues, attend, visible_pairs
from irg_jax.model.kernels import fused
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.model.vit import patch_tokens
from irg_jax.progress import Progress
from irg_jax.tokens import CAUSAL, Tokens, allowed
from irg_jax.train.settings import Switches, TrainSettings
from irg_jax.train.step import init_state, make_optimizer, make_train_step, unit_flops
from irg_jax.weights import names

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPECIAL = SpecialTokens(text_end=-1)  # no token: a thought never ends by itself
# Relative errors. A product in TF32, a mask or a sum that is wrong are all above them.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of everything that is run."""

  model: ModelConfig  # of thinking and denoising, and the heads of attention
  training: tuple[tuple[str, ModelConfig], ...]  # the first that fits is trained
  pixels: int  # of the image that is denoised
  cache: int  # slots a row
  words: int  # tokens of a thought
  causal: int  # tokens of the causal row
  images: tuple[int, int]  # latent tokens and patches along a side, in packed rows
  compared: tuple[int, int]  # likewise, of the row that is compared with the dense form
  dtypes: tuple[str, ...]  # of that comparison
  product: int  # side of the matrix product
  batches: tuple[int, ...]  # rows that generate together


def full_sizes(layers: int | None) -> Sizes:
  model = config_lib.read_model(ROOT / "configs" / "bagel_7b.py")
  change = dataclasses.replace
  remat = TrainSettings().model.remat
  # As wide as the 7B model, but few layers and words: the state in float32 fits one device.
  wide = lambda layers: change(
      model, remat=remat, vit=change(model.vit, num_layers=2),
      llm=change(model.llm, num_layers=layers, vocab_size=32768))
  bench = change(config_lib.read_model(ROOT / "configs" / "bench.py"), dtype="bfloat16",
                 max_latent_size=64, remat=remat)
  bench = change(bench, vit=change(bench.vit, grid_size=70))
  return Sizes(
      change(model, llm=change(model.llm, num_layers=layers or model.llm.num_layers)),
      (*((f"7B width, layers {n}", wide(n)) for n in (4, 1)), ("configs/bench.py", bench)),
      pixels=1024, cache=16384, words=128, causal=8192, images=(32, 36), compared=(16, 18),
      dtypes=tuple(TOLERANCES), product=8192, batches=(1, 4))


def small_sizes(layers: int | None) -> Sizes:
  model = config_lib.read_model(ROOT / "configs" / "tiny.py")
  model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, num_layers=layers or 1))
  return Sizes(model, (("configs/tiny.py", model),), pixels=32, cache=512, words=4, causal=128,
               images=(2, 2), compared=(2, 2), dtypes=("float32",), product=64,
               batches=(1,))


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
  parser.add_argument("--out", default="out/device.json", help="JSON file, default: %(default)s")
  parser.add_argument("--small", action="store_true", help="tiny sizes, to try it on a CPU")
  parser.add_argument("--layers", type=int, help="layers of think and denoise; default: all, 28")
  parser.add_argument("--limit", type=float, default=480, help="seconds after which no row begins")
  parser.add_argument("--repeat", type=int, default=3, help="timings, of which the best counts")
  args = parser.parse_args(argv)
  parts = args.parts.split(",")
  if unknown := sorted(set(parts) - set(PARTS)):
    parser.error(f"unknown parts {', '.join(unknown)}; known: {', '.join(PARTS)}")
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  sizes = (small_sizes if args.small else full_sizes)(args.layers)
  prepare_device(args.small)
  with Progress() as progress:
    run = Run(progress, args.limit, args.repeat, {"small": args.small, "parts": parts} | {
        "layers": sizes.model.llm.num_layers, "pixels": sizes.pixels, "cache": sizes.cache})
    for name, part in {"oracle": oracle, **{name: PARTS[name] for name in parts}}.items():
      run.part(name, functools.partial(part, run, sizes))
      storage.write_json(out, run.content())
  print(run.text())
  print(f"written to {out}")
  return 0 if run.passed() else 1


def prepare_device(small: bool) -> None:
  """Settings of XLA, before JAX first looks for devices; what the user has set stays."""
  # JAX takes three quarters of a GPU by default.
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", ".92")
  if small:  # a quarter of the time to compile on a CPU
    os.environ.setdefault("XLA_FLAGS", "--xla_llvm_disable_expensive_passes=true "
                          "--xla_backend_optimization_level=0")


# --- the kernels against the dense form


def oracle(run, sizes):
  """Compares the kernels, compiled, with the dense form in float32 at its highest precision."""
  llm, vit = sizes.model.llm, sizes.model.vit
  batch = train_benchmark.make_batch(sizes.model, [[0, 2]], *sizes.compared)
  rows = {"packed row": (batch.tokens, llm.num_heads, llm.num_kv_heads, llm.head_dim),
          "ViT patches": (patch_tokens(batch.vit_image), vit.num_heads, vit.num_heads,
                          vit.hidden_size // vit.num_heads)}
  for name, (tokens, *heads) in rows.items():
    for dtype in sizes.dtypes:
      run.attempt(f"{name}, {dtype}", functools.partial(
          compared, TOLERANCES[dtype], both_passes, *arrays(tokens, *heads, dtype), tokens))
  for dtype in sizes.dtypes:
    run.attempt(f"3 views of a cache, {dtype}", functools.partial(
        compared, TOLERANCES[dtype], output_of_views,
        *cached_arrays(sizes.model, min(sizes.pixels, 256), min(sizes.cache, 1024), dtype)))


def compared(tolerance, passes, *args) -> dict:
  """Relative errors of the kernel's results, and whether they are within the tolerance."""
  got = jax.jit(functools.partial(passes, "kernel"))(*args)
  exact = jax.tree.map(
      lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, args)
  with jax.default_matmul_precision("highest"):
    want = jax.jit(functools.partial(passes, "dense"))(*exact)
  return judged({name: relative_error(got[name], want[name]) for name in want}, tolerance)


def judged(errors: dict, tolerance: float) -> dict:
  """A row of the first table; an error that is not a number is out of tolerance."""
  return {"errors": errors, "tolerance": tolerance,
          "within": all(error <= tolerance for error in errors.values())}


def relative_error(got, want) -> float:
  """Norm of the difference over the norm of `want`."""
  got, want = (jnp.asarray(x, jnp.float32) for x in (got, want))
  return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-30))


def both_passes(form, q_BTNH, k_BKSH, v_BKSH, d_BTNH, tokens):
  function = lambda q, k, v: attend(q, tokens, [KeyValues(k, v, tokens)], implementation=form)
  out_BTNH, backward = jax.vjp(function, q_BTNH, k_BKSH, v_BKSH)
  return dict(zip(("out", "dq", "dk", "dv"), (out_BTNH, *backward(d_BTNH))))


def output_of_views(form, q_RTNH, query, *sources):
  return {"out": attend(q_RTNH, query, list(sources), implementation=form)}


# --- attention


def attention(run, sizes):
  """Attention of a causal row, of a packed row, and of three views of a cache."""
  run.attempt(f"{sizes.product}-cubed matrix product", lambda: run.timed(
      jnp.dot, *(normal(i, 0, (sizes.product,) * 2, "bfloat16", 1.0) for i in range(2)),
      flops=2.0 * sizes.product**3))
  llm = sizes.model.llm
  step_1T = jnp.arange(sizes.causal)[None]
  causal = Tokens(sample=0 * step_1T, index=step_1T, split=0 * step_1T, kind=0 * step_1T + CAUSAL)
  packed = train_benchmark.make_batch(sizes.model, [[0, 2, 1]], *sizes.images).tokens
  for name, tokens in (("causal", causal), ("packed", packed)):
    name += f", {tokens.sample.shape[1]} tokens"
    *qkv, d_BTNH = arrays(tokens, llm.num_heads, llm.num_kv_heads, llm.head_dim, "bfloat16")
    group = llm.num_heads // llm.num_kv_heads
    prepare = lambda tokens: fused.prepare(tokens, [tokens], [1], group, llm.head_dim)
    run.attempt(f"{name}: the kernel's lists", lambda: run.timed(prepare, tokens))
    # The causal row as cuDNN likes it best: without a mask in memory.
    mask = None if tokens is causal else jax.jit(allowed)(tokens, tokens)[:, None]
    extra = tokens, jax.jit(prepare)(tokens), mask
    flops = 4.0 * llm.num_heads * llm.head_dim * float(visible_pairs(tokens))
    for form, function in row_forms().items():
      run.attempt(f"{name}: {form}, forward", lambda: run.timed(function, *qkv, extra, flops=flops))
      # Two products forward, five backward.
      run.attempt(f"{name}: {form}, both passes", lambda: run.timed(
          with_backward(function), *qkv, d_BTNH, extra, flops=3.5 * flops))
  views(run, sizes)


def views(run, sizes):
  """The attention of `denoise`: the queries of three views, themselves and one cache."""
  llm = sizes.model.llm
  q_RTNH, query, own, cache = cached_arrays(sizes.model, sizes.pixels, sizes.cache, "bfloat16")
  T, slots = q_RTNH.shape[1], float(jnp.sum(cache.tokens.sample == 0))
  flops = 4.0 * llm.num_heads * llm.head_dim * T * (3 * T + slots)
  for form in ("kernel", "chunked"):
    function = functools.partial(output_of_views, form)
    run.attempt(f"3 views of {T} tokens, cache of {sizes.cache}: {form}, forward",
                lambda: run.timed(function, q_RTNH, query, own, cache, flops=flops))


def row_forms() -> dict:
  """Functions (q, k, v, extra) by name; `extra` is (tokens, the kernel's lists, dense mask)."""
  def ours(form, q_BTNH, k_BKSH, v_BKSH, extra):
    tokens, prepared, _ = extra
    return attend(q_BTNH, tokens, [KeyValues(k_BKSH, v_BKSH, tokens)], implementation=form,
                  prepared=prepared if form == "kernel" else None)

  def library(form, q_BTNH, k_BKSH, v_BKSH, extra):
    k_BSKH, v_BSKH = (jnp.swapaxes(x, 1, 2) for x in (k_BKSH, v_BKSH))
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=extra[2],
                                        is_causal=extra[2] is None, implementation=form)

  forms = {form: functools.partial(ours, form) for form in ("kernel", "chunked")}
  for form in ("cudnn", "xla") if jax.default_backend() == "gpu" else ("xla",):
    forms[f"jax.nn, {form}"] = functools.partial(library, form)
  return forms


def with_backward(function):
  def both(q_BTNH, k_BKSH, v_BKSH, d_BTNH, extra):
    out, backward = jax.vjp(lambda *qkv: function(*qkv, extra), q_BTNH, k_BKSH, v_BKSH)
    return out, backward(d_BTNH)
  return both


# --- training


def train(run, sizes):
  """A step of the first of the models that fits, over two packed rows."""
  run.forget()
  for name, config in sizes.training:
    batch = train_benchmark.make_batch(config, train_benchmark.LAYOUTS[2], *sizes.images)
    tokens = int(jnp.sum(batch.tokens.sample >= 0))
    if run.attempt(f"{name}, a step of {tokens} tokens",
                   lambda: train_step(run, config, batch, tokens)):
      return


def train_step(run, config, batch, tokens) -> dict:
  settings = dataclasses.replace(TrainSettings(), model=config)
  optimizer = make_optimizer(settings.optimizer, settings.stage2)
  mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
  start = functools.partial(init_state, optimizer=optimizer)
  shapes = jax.eval_shape(start, names.abstract_params(config, jnp.float32)["transformer"])
  start = jax.jit(start, donate_argnums=0, out_shardings=sharding.parameter_shardings(shapes, mesh))
  state = start(random_weights(config, "float32", vit=True))
  step = make_train_step(UnifiedTransformer(config), optimizer, settings, mesh, state, batch)
  key = jax.random.key(1)
  flops = sum(train_benchmark.needed_flops(config, batch).values())
  return run.timed(None, state, batch, key, flops=flops, tokens=tokens,
                   lower=lambda: step.lower(Switches(), state, batch, key),
                   again=lambda args, out: (out[0], *args[1:]))  # the state is donated


# --- generation


def think(run, sizes):
  """Tokens of thoughts, decoded one after the other for all rows together."""
  config, words = sizes.model, sizes.words
  model, params = UnifiedTransformer(config), run.once("weights", lambda: random_weights(
      config, "bfloat16"))

  def write(params, ctx, keys_B):
    draft = steps.new_draft(config, len(keys_B), words, SPECIAL)
    return steps.think(model, params, ctx, draft, keys_B, words, sampling=Sampling(),
                       special=SPECIAL)

  for batch in sizes.batches:
    run.attempt(f"batch {batch}, {words} tokens, cache of {sizes.cache}", lambda: run.timed(
        write, params, full_context(config, batch, sizes.cache), steps.row_keys(
            jnp.arange(batch, dtype=jnp.uint32), 0, "think"), tokens=batch * words))


def denoise(run, sizes):
  """One Euler update of an image under one, two and three views."""
  config, side = sizes.model, sizes.pixels // sizes.model.pixel_stride
  model, params = UnifiedTransformer(config), run.once("weights", lambda: random_weights(
      config, "bfloat16"))
  settings, latents = Settings(), side**2
  times_M = jnp.asarray(flow.schedule(settings.steps, settings.timestep_shift))
  for batch in sizes.batches:
    for count in range(1, len(VIEWS) + 1):
      def update(params, ctx, x_BPC, times_M, views=VIEWS[:count]):
        return steps.denoise(model, params, ctx, x_BPC, times_M, settings.later, 0, 1,
                             grid=(side, side), special=SPECIAL, views=views)

      def measured():
        ctx = full_context(config, batch, sizes.cache)
        slots = float(jnp.sum(ctx.visible[0, :count]))
        noise = normal(0, 0, (batch, latents, config.latent_dim), "float32", 1.0)
        return run.timed(update, params, ctx, noise, times_M,
                         flops=batch * pass_flops(config, latents, count, slots))

      run.attempt(f"batch {batch}, {count} views, {sizes.pixels} x {sizes.pixels}, cache of "
                  f"{sizes.cache}", measured)


def pass_flops(config, latents: int, count: int, slots: float) -> float:
  """FLOPs of a row under `count` views that see `slots` of the cache together, by formula."""
  each, tokens = unit_flops(config), latents + 2
  return (count * (2 * each["und"] + latents * each["gen"])
          + tokens * (count * tokens + slots) * each["pairs"])


# The training step last: it may take minutes to compile.
PARTS = {"attention": attention, "think": think, "denoise": denoise, "train": train}

if __name__ == "__main__":
  sys.exit(main())
