"""The real programs of training and generation, on shapes instead of arrays."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from irg_jax import flow, sharding
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.data.batch import pack_row
from irg_jax.data.sequence import TextSplit, sample_features
from irg_jax.generate import steps
from irg_jax.generate.context import FULL, NO_IMAGE, VIEWS, Context, rung
from irg_jax.generate.settings import Settings
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train import flops
from irg_jax.train.optimizer import make_optimizer
from irg_jax.train.settings import Switches, TrainSettings
from irg_jax.train.state import init_state
from irg_jax.train.step import make_train_step
from irg_jax.weights.names import abstract_params

GENERATION = ("read_text", "read_picture", "think", "draw", "decode_pixels", "encode_pixels")
_SPECIAL = SpecialTokens()


@dataclasses.dataclass(frozen=True)
class Program:
  """Something to compile.

  Attributes:
    name, unit: what it is, and what one run of it makes, for people.
    mesh: that it is made for.
    lower: function () -> `jax.stages.Lowered`; to be called with the mesh set.
    needed_flops: matrix products and attention over all chips, counted on paper, nothing
      twice; None where nobody counted.
  """

  name: str
  unit: str
  mesh: jax.sharding.Mesh
  lower: Callable
  needed_flops: float | None = None


def train_program(settings: TrainSettings, stage: str, mesh) -> Program:
  """One update of a stage, state and batch as `irg train` has them."""
  s, rows = getattr(settings, stage), settings.data.rows
  optimizer = make_optimizer(settings.optimizer, s)
  params = abstract_params(settings.model, jnp.float32)["transformer"]
  state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
  batch = _batch(settings, s.sizes)
  model = UnifiedTransformer(settings.model)
  step = make_train_step(model, optimizer, settings, mesh, state, batch)
  key = jax.eval_shape(lambda: jax.random.key(0))
  count = rows * settings.data.accumulate
  return Program(
      f"train {stage}", f"an update of {count} rows of {s.sizes.und + s.sizes.gen} tokens", mesh,
      lambda: step.lower(Switches(), state, batch, key),
      count * flops.row_flops(settings.model, s.sizes))


def _batch(settings, sizes):
  """Shapes of a global batch; taken from a real row, so that they cannot fall behind."""
  features = sample_features([TextSplit([0], need_loss=True)], settings.model, _SPECIAL)
  lead = (settings.data.rows,)
  if settings.data.accumulate > 1:
    lead = (settings.data.accumulate, *lead)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype),
                      pack_row([features], sizes))


def generation_programs(config: ModelConfig, settings: Settings, rows: int, cache: int,
                        mesh) -> list[Program]:
  """The steps of `irg generate` for a batch of `rows` and a cache of `cache` slots a row.

  Texts are as long as the settings allow, the cache is full, guidance is that of the later
  rounds: the most that a run can need. Weights and cache are in `config.dtype`.
  """
  s, g = settings, _Generation(config, rows, cache, mesh)
  grid = (s.height // config.pixel_stride, s.width // config.pixel_stride)
  vae_width, vae_height = s.vae_transform.size(s.width, s.height)
  vit_grid = tuple(side // config.vit.patch_size
                   for side in reversed(s.vit_transform.size(vae_width, vae_height)))
  latents, patches = grid[0] * grid[1], vit_grid[0] * vit_grid[1]
  views = steps.guidance_views(s.later)
  vit_dim, z = config.vit.patch_size**2 * 3, config.vae.z_channels
  text = rung(s.think_limit + 1)
  updates, down = s.steps - 1, config.vae.downsample
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  transformer, vae, model = g.params["transformer"], g.params["vae"], UnifiedTransformer(config)
  f32 = lambda *shape: g.array(shape, jnp.float32)
  calls = {
      "read_text": (f"a text of {text} tokens a row", lambda: steps.append_text.lower(
          model, transformer, g.context, g.array((rows, text), jnp.int32),
          g.array((rows,), jnp.int32), (FULL, NO_IMAGE)), g.flops(und=text, seen=text)),
      "read_picture": ("an image a row, VAE and ViT", lambda: steps.append_image.lower(
          model, transformer, g.context, f32(rows, latents, config.latent_dim),
          f32(rows, patches, vit_dim), latent_grid=grid, vit_grid=vit_grid, special=_SPECIAL),
          g.flops(und=patches + 4, gen=latents, vit=patches, seen=patches + latents + 4)),
      "think": (f"a thought of {s.think_limit - 1} tokens a row", lambda: steps.think.lower(
          model, transformer, g.context, keys, limit=s.think_limit, sampling=s.sampling,
          special=_SPECIAL), (s.think_limit - 1) * g.flops(und=1, text=1, seen=1)),
      "draw": (f"{updates} updates under {len(views)} views, an image a row",
               lambda: steps.denoise.lower(
                   model, transformer, g.context, f32(rows, latents, config.latent_dim),
                   flow.schedule(s.steps, s.timestep_shift), s.later, grid=grid,
                   special=_SPECIAL, views=views),
               updates * len(views) * g.flops(und=2, gen=latents, seen=latents + 2)),
      "decode_pixels": ("an image a row", lambda: steps.decode_pixels.lower(
          config, vae, f32(rows, latents, config.latent_dim), grid), None),
      "encode_pixels": ("an image a row", lambda: steps.encode_pixels.lower(
          config, vae, f32(rows, vae_height, vae_width, 3),
          f32(rows, vae_height // down, vae_width // down, z)), None),
  }
  return [Program(name, unit, mesh, lower, needed)
          for name, (unit, lower, needed) in calls.items()]


class _Generation:
  """What the generation steps share: parameters and context as shapes, FLOPs of a pass."""

  def __init__(self, config, rows, cache, mesh):
    self._config, self._rows, self._cache, self._mesh = config, rows, cache, mesh
    llm = config.llm
    params = abstract_params(config, jnp.dtype(config.dtype))
    self.params = jax.tree.map(self._sharded, params, sharding.parameter_shardings(params, mesh))
    kv = self.array((llm.num_layers, rows, llm.num_kv_heads, cache, llm.head_dim),
                    jnp.dtype(config.dtype), "layers", "batch", "heads", None, None)
    self.context = Context(
        k=kv, v=kv, length=self.array((rows,), jnp.int32),
        visible=self.array((rows, len(VIEWS), cache), jnp.bool_),
        position=self.array((rows, len(VIEWS)), jnp.int32))

  def array(self, shape, dtype, *axes):
    axes = axes or ("batch",) + (None,) * (len(shape) - 1)
    spec = sharding.partition_spec(shape, axes, self._mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

  def flops(self, seen, **tokens) -> float:
    """One pass of the decoder over `tokens` a row, each seeing `seen` tokens and the cache."""
    c, each = self._config, flops.token_flops(self._config)
    total = sum(count * each[name] for name, count in tokens.items())
    asking = tokens.get("und", 0) + tokens.get("gen", 0)
    pairs = asking * (seen + self._cache)
    total += 4.0 * c.llm.num_layers * c.llm.hidden_size * pairs
    total += 4.0 * c.vit.num_layers * c.vit.hidden_size * tokens.get("vit", 0) ** 2
    return self._rows * total

  def _sharded(self, x, placed):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
