"""The compiled programs of training and generation, traced on shapes instead of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from irg_jax import flow, sharding
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.data.batch import BufferSizes, pack_row
from irg_jax.data.samples import TextSplit, sample_features
from irg_jax.generate import forecast, steps
from irg_jax.generate.context import (
    FULL, NO_IMAGE, NO_TEXT, guidance_views, new_context, rung, view_mask)
from irg_jax.generate.settings import Settings
from irg_jax.model.attention import choose
from irg_jax.model.kernels import tpu
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train.settings import Switches, TrainSettings
from irg_jax.train.step import (
    init_state, make_optimizer, make_train_step, row_flops, trained_shapes)
from irg_jax.weights.names import abstract_params

_SPECIAL = SpecialTokens()
# Share of the pairs of blocks in a row of `configs/irgl.py` that the TPU kernel visits, the mean of
# 12 rows of the shape of IRGL-300K (python benchmarks/data.py): in the decoder by the parts of a
# row on `sequence`, that of the busiest part, for which the others wait; in the ViT.
VISIBLE = {"stage1": ({1: 0.227, 2: 0.240, 4: 0.305, 8: 0.420}, 0.374),
           "stage2": ({1: 0.237, 2: 0.280, 4: 0.318, 8: 0.385}, 0.545)}
# Mean tokens of such conversations, with the two ends of a text.
SYSTEM, PROMPT, THOUGHT = 92, 112, 802


@dataclasses.dataclass(frozen=True)
class Case:
  """A case of the data that a program may get.

  Attributes:
    label: for people; empty if there is one case.
    visible: (share of the pairs of blocks that a kernel visits, share of them that a view sees),
      by the keys of a row from which on they hold; rows with fewer keys are visible in whole.
    needed_flops: FLOPs of matrix products and attention by formula, over all chips, without
      recomputation; None if there is no formula.
  """

  label: str = ""
  visible: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
  needed_flops: float | None = None

  def share(self, keys: int) -> tuple[float, float]:
    """`visible` for rows of so many keys."""
    known = [n for n in self.visible if n <= keys]
    return self.visible[max(known)] if known else (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    name: as in `irg plan --programs`.
    unit: the work of one run, for people.
    mesh: the mesh to compile for; set it while calling `trace`.
    trace: function () -> `jax.stages.Traced`.
    cases: what the data may be; the first one is the most that the program can have to do.
    attention: form of attention of each part, for people.
  """

  name: str
  unit: str
  mesh: jax.sharding.Mesh
  trace: Callable
  cases: tuple[Case, ...] = (Case(),)
  attention: tuple[str, ...] = ()


def train_program(settings: TrainSettings, stage: str, mesh,
                  visible: float | None = None) -> Program:
  """One update of a stage, with the state and batch shapes of `irg train`.

  `visible` is the share of pairs of blocks of the decoder that the kernel visits; None takes the
  one that was measured.
  """
  s, data, model = getattr(settings, stage), settings.data, settings.model
  optimizer, state, base = trained(settings, s)
  row = pack_row([sample_features([TextSplit([0], need_loss=True)], model, _SPECIAL)], s.sizes)
  lead = (data.rows,) if data.accumulate == 1 else (data.accumulate, data.rows)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), row)
  step = make_train_step(UnifiedTransformer(model), optimizer, settings, mesh, state, batch,
                         *base)
  key, count = jax.eval_shape(lambda: jax.random.key(0)), math.prod(lead)
  tokens = s.sizes.und + s.sizes.gen
  parts = {"decoder": (tokens, [tokens]), "ViT": (s.sizes.vit, [s.sizes.vit])}
  forms = attention_forms(model, mesh, parts)
  case = _row_case(settings, stage, mesh, visible, forms)
  return Program(
      f"train {stage}", f"an update of {count} rows of {tokens} tokens", mesh,
      functools.partial(step.trace, Switches(), state, batch, key, *base), (case,),
      tuple(f"{part} {form}" for part, form in forms.items()))


def trained(settings, stage):
  """(optimizer, shapes of the state, [shapes of the frozen weights] of adapters) of a training."""
  model, optimizer = settings.model, make_optimizer(settings.optimizer, stage)
  state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer),
                         trained_shapes(settings))
  base = [abstract_params(model, jnp.dtype(model.dtype))["transformer"]] * bool(settings.lora.rank)
  return optimizer, state, base


def _row_case(settings, stage, mesh, visible, forms) -> Case:
  """Rows of which each sample sees itself; without a kernel, attention counts whole rows."""
  sizes, (by_parts, vit) = getattr(settings, stage).sizes, VISIBLE[stage]
  parts = mesh.shape["sequence"]
  busiest = by_parts[max(n for n in by_parts if n <= parts)]
  mean = by_parts[1]
  if visible is not None:
    busiest, mean = visible * busiest / mean, visible
  if forms["decoder"] != "kernel":
    busiest = mean = 1.0
  vit = vit if forms["ViT"] == "kernel" else 1.0
  rows = settings.data.rows * settings.data.accumulate
  needed = row_flops(settings.model, sizes, {"pairs": mean, "vit_pairs": vit}, settings.lora)
  busiest = min(busiest, 1.0)
  return Case("", {sizes.vit: (vit, vit), sizes.und + sizes.gen: (busiest, busiest)}, rows * needed)


def attention_forms(config, mesh, parts) -> dict[str, str]:
  """Form of attention of each part, given (queries, keys of each source), and why no kernel."""
  with jax.set_mesh(mesh):
    found = {name: choose(*lengths) for name, lengths in parts.items()}
    on = sharding.platform()
  if config.attention != "auto":
    return {name: config.attention if config.attention == "kernel" else
            f"{config.attention} (as set)" for name in parts}
  why = {"kernel": lambda queries: "", "dense": lambda queries: " (a short row)",
         "chunked": lambda queries: " (few queries a row: bound by reading the cache)"
         if queries < 16 else f" (no kernel on {on})"}
  return {name: form + why[form](parts[name][0]) for name, form in found.items()}


def generation_programs(config: ModelConfig, settings: Settings, rows: int, cache: int,
                        mesh, visible: float | None = None,
                        weights: str | None = None) -> list[Program]:
  """The steps of `irg generate`, at their most expensive.

  Texts have the longest length that the settings allow, the cache is full, and guidance is that of
  the later rounds. Weights and cache have `config.dtype`. A second case is the cache of a second
  round with texts of mean length.

  Args:
    rows: prompts generated together.
    cache: slots per row.
    visible: share of the cache that is visible in the second case; None: by texts and image.
    weights: as of `names.abstract_params`.
  """
  s, model, vit_patch = settings, UnifiedTransformer(config), config.vit.patch_size
  grid = s.height // config.pixel_stride, s.width // config.pixel_stride
  width, height = s.vae_transform.size(s.width, s.height)
  vit_grid = tuple(side // vit_patch for side in s.vit_transform.size(width, height)[::-1])
  latents, patches, thought = math.prod(grid), math.prod(vit_grid), s.think_limit - 1
  image = latents + patches + 4
  views, text, down = guidance_views(s.later), rung(s.think_limit + 1), config.vae.downsample

  array = functools.partial(_array, mesh)
  made = functools.partial(_program, config, mesh, cache, image, visible)
  needed = functools.partial(_needed, config, rows, cache)
  params = abstract_params(config, jnp.dtype(config.dtype), weights)
  params = jax.tree.map(lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
                        params, sharding.parameter_shardings(params, mesh))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # it says how often heads are repeated
    shapes = jax.eval_shape(lambda: (new_context(config, rows, cache),
                                     steps.new_draft(config, rows, thought, _SPECIAL)))
  context, draft = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), shapes)
  on_context, scalar = (model, params["transformer"], context), array(dtype=jnp.int32)
  noise = array(rows, latents, config.latent_dim)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  turns, denoise, static = _denoise(s, mesh, on_context, noise, views, scalar)
  return [
      made(f"a text of {text} tokens a row", steps.append_text, *on_context,
           array(rows, text, dtype=jnp.int32), array(rows, dtype=jnp.int32),
           view_mask((FULL, NO_IMAGE)),
           parts={"decoder": (text, [text, cache])}, flops=needed(und=text)),
      made("an image a row, VAE and ViT", steps.append_image, *on_context, noise,
           array(rows, patches, vit_patch**2 * 3), latent_grid=grid, vit_grid=vit_grid,
           special=_SPECIAL, flops=needed(und=patches + 4, gen=latents, vit=patches),
           parts={"decoder": (image, [image, cache]), "ViT": (patches, [patches])}),
      made(f"a thought of {thought} tokens a row", steps.think, *on_context, draft, keys, scalar,
           sampling=s.sampling, special=_SPECIAL, flops=needed(und=1, text=1, times=thought),
           parts={"decoder": (1, [1, cache, thought])}),
      made(f"{s.steps - 1} updates{f', {turns} with the decoder,' if turns < s.steps - 1 else ''} "
           f"under {len(views)} views, an image a row", *denoise, grid=grid, special=_SPECIAL,
           seen_by=views,
           flops=needed(und=2, gen=latents, times=turns * len(views)),
           parts={"decoder": (latents + 2, [latents + 2, cache])}, **static),
      made("an image a row", steps.decode_pixels, config, params["vae"], noise, grid),
      made("an image a row", steps.encode_pixels, config, params["vae"],
           array(rows, height, width, 3),
           array(rows, height // down, width // down, config.vae.z_channels))]


def _denoise(s, mesh, on_context, noise, views, scalar):
  """(updates with the decoder, the program of `s` with its arguments, its static arguments)."""
  times = flow.schedule(s.steps, s.timestep_shift)
  if s.forecast.interval == 1:
    return s.steps - 1, (steps.denoise, *on_context, noise, times, s.later, scalar, scalar), {
        "views": views}
  schedule = forecast.schedule(np.ones(s.steps - 1, bool), s.forecast)
  turns, (rows, latents, _) = int(schedule.passes.sum()), noise.shape
  known = jax.eval_shape(functools.partial(
      forecast.blank, on_context[0].config, s.forecast.order, rows, latents))
  spec = sharding.partition_spec(known.shape, (None, "batch", "length", "embed"), mesh)
  known = jax.ShapeDtypeStruct(known.shape, known.dtype, sharding=NamedSharding(mesh, spec))
  return turns, (steps.denoise_forecast, *on_context, noise, dict.fromkeys(views, known), times,
                 dict.fromkeys(views, schedule.padded(len(times))), s.later, scalar, scalar), {
                     "passes": views, "turns": turns}


def _array(mesh, *shape, dtype=jnp.float32):
  """An array of rows, or of a cache [layers, rows, kv heads, slots, head dim]."""
  axes = ("batch", None, None, None)[:len(shape)]
  axes = ("layers", "batch", "heads", None, None) if len(shape) == 5 else axes
  placed = NamedSharding(mesh, sharding.partition_spec(shape, axes, mesh))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)


def _program(config, mesh, cache, image, visible, unit, step, *args, parts=None, flops=None,
             seen_by=(FULL,), **static) -> Program:
  """A step of generation; `flops` is of `_needed`, `parts` the lengths for `attention_forms`."""
  forms = attention_forms(config, mesh, parts or {})
  cases = [Case("", {}, flops and flops(1.0))]
  visited, seen = _second_round(image, cache, seen_by) if visible is None else [visible] * 2
  if forms.get("decoder") == "kernel" and seen < 1:
    cases.append(Case(f"{seen:.0%} of the cache", {cache: (visited, seen)}, flops(seen)))
  return Program(step.__name__, unit, mesh, functools.partial(step.trace, *args, **static),
                 tuple(cases), tuple(f"{part} {form}" for part, form in forms.items()))


def _needed(config, rows, cache, und, gen=0, vit=0, text=0, times=1):
  """Function (share of the cache) -> FLOPs of passes over tokens that attend to each other."""
  sizes = BufferSizes(und=und, gen=gen, vit=vit, text=text, samples=1)
  pairs = lambda share: 1 + share * cache / (und + gen)
  return lambda share: times * rows * row_flops(  # a third is the forward pass
      config, sizes, {"pairs": pairs(share)}) / 3


def _second_round(image: int, cache: int, views) -> tuple[float, float]:
  """Shares of the blocks of a cache: seen by any of the views, and seen by one on average.

  The cache holds system prompt, prompt, thought, an image of so many tokens, the thought about it,
  and that thought again for the view without images.
  """
  text = SYSTEM + PROMPT + THOUGHT
  after = text + image + THOUGHT
  spans = {FULL: [(0, after)], NO_TEXT: [(text, text + image)],
           NO_IMAGE: [(0, text), (after, after + THOUGHT)]}
  size = tpu.block_sizes(1, cache, 1)[1]
  count = -(-cache // size)
  seen = [{block for start, end in spans[view]
           for block in range(start // size, min(-(-end // size), count))} for view in views]
  return len(set().union(*seen)) / count, sum(map(len, seen)) / count / len(views)
