"""The train step: noise, losses, gradients, optimizer and EMA; its metrics and FLOPs."""

import dataclasses
import math
import re
from typing import Any

import einops
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import flow
from irg_jax.config import ModelConfig
from irg_jax.data.batch import BufferSizes
from irg_jax.model.attention import visible_pairs
from irg_jax.model.vit import patch_tokens
from irg_jax.sharding import (constrain_parameters, gather_parameters, parameter_shardings,
                              partition_spec)
from irg_jax.tokens import PADDING
from irg_jax.train.loss import TINY, loss_sums, mean_losses, token_losses
from irg_jax.train.settings import OptimizerSettings, StageSettings, Switches, TrainSettings
from irg_jax.weights import lora, names
from irg_jax.weights.names import TIMESTEP_FEATURES

MATRICES = ("kernel", "embedding", lora.A, lora.B)
# Parameters by the names of `settings.Freeze`: patterns of the beginning of their paths.
FREEZABLE = {
    "und": r"decoder/(layers/und/|und_norm/)",
    "gen": r"decoder/(layers/gen/|gen_norm/)",
    "vit": r"vit/",
    "llm": r"decoder/|embed/|heads/text/",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """The state of one stage."""

  step: jax.Array  # int32 scalar, updates made in this stage
  params: Any  # float32, what is trained: all of the UnifiedTransformer, or adapters of it
  ema: Any  # exponential moving average of `params`
  opt_state: Any  # of optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optax transformation of a stage; its learning rate by the number of updates made."""

  transform: optax.GradientTransformation
  schedule: optax.Schedule


def make_train_step(model, optimizer: Optimizer, settings: TrainSettings, mesh, state, batch,
                    *base):
  """The jitted `train_step`, for a state and a batch of the given shapes on a mesh.

  Returns:
    `step(switches, state, batch, key, *base) -> (state, metrics)`. `switches` is static, the state
    is donated, the metrics are replicated. `base` are the frozen parameters of adapters, if any.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  states = parameter_shardings(state, mesh)

  def step(switches, state, batch, key, *base):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return train_step(model, optimizer, switches, settings, state, batch, key, *base)

  return jax.jit(step, static_argnums=0, donate_argnums=1, out_shardings=(states, replicated),
                 in_shardings=(states, batch_shardings(batch, mesh), replicated,
                               *(parameter_shardings(x, mesh) for x in base)))


def batch_shardings(batch, mesh):
  """NamedShardings of a Batch or of its shapes, with or without the leading axis A."""
  lead = batch.text_ids.ndim - 2

  def sharding(path, x):
    # The axis I, samples of a row, is no axis of tokens.
    length = None if jax.tree_util.keystr(path).startswith(".sample_") else "length"
    axes = (None,) * lead + ("global_batch", length) + (None,) * (x.ndim - lead - 2)
    return NamedSharding(mesh, partition_spec(x.shape, axes, mesh))

  return jax.tree.map_with_path(sharding, batch)


def train_step(model, optimizer: Optimizer, switches: Switches, settings: TrainSettings,
               state: TrainState, batch, key, base=None):
  """One update of the state.

  Args:
    model: UnifiedTransformer. Its config has the compute dtype.
    batch: Batch; under accumulation its arrays have a leading axis A.
    key: of the stage. Noise depends on the key, the step and the shape of the batch only.
    base: the frozen parameters whose adapters the state holds; None: it holds the parameters.

  Returns:
    (state, metrics: dict of float32 scalars).
  """
  key = jax.random.fold_in(key, state.step)
  params = cast_kernels(state.params, model.config.dtype)
  base = {} if base is None else cast_kernels(base, model.config.dtype)
  # Means are over all batches of the update, so the divisors come before the first loss.
  divisors = {name: jnp.maximum(jnp.sum(weight), TINY) for name, weight in
              (("ce", batch.text_weight), ("mse", batch.latent_weight))}

  def objective(params, part, noise):
    params = map_frozen(jax.lax.stop_gradient, params, switches.frozen)
    with lora.applied(settings.lora.scale):
      sums = loss_sums(*token_losses(model, lora.beside(base, params), part, *noise), part)
    losses = (sums[name] / divisors[name] for name in switches.losses)
    return sum(losses, jnp.zeros(())), sums | token_counts(part)

  def gradients_of(part, key):
    noise = sample_noise(part, key, settings.timestep_shift)
    return _gradients(objective, params, *_by_slice((part, noise)))

  gradients, sums = _over_slices(gradients_of(batch, key) if batch.text_ids.ndim == 2 else
                                 _accumulate(gradients_of, batch, key))
  metrics = mean_losses(sums)
  metrics |= {"loss": metrics["ce"] + metrics["mse"], "grad_norm": optax.tree.norm(gradients),
              "learning_rate": jnp.asarray(optimizer.schedule(state.step), jnp.float32)}
  metrics |= usage(sums, batch)
  return update(optimizer, state, gradients, switches.frozen, settings.ema_decay), metrics


def cast_kernels(params, dtype):
  """Casts matrices and embeddings to the compute dtype; scales and biases stay float32, int8 int8.

  Once a step and in the sharding of the parameters, so that the mesh gathers the short form.
  """
  is_matrix = lambda path, x: path[-1].key in MATRICES and x.dtype != jnp.int8
  return gather_parameters(constrain_parameters(jax.tree.map_with_path(
      lambda path, x: x.astype(dtype) if is_matrix(path, x) else x, params)))


def sample_noise(batch, key, shift):
  """Samples flow times and noise for a batch (docs/spec.md, section 4).

  Returns:
    (timestep float32 [B, G], the same for all tokens of an image and 0 on clean ones; standard
    normal noise float32 [B, G, C]).
  """
  time_key, noise_key = jax.random.split(key)
  rows, latents = batch.latent_image.shape
  images = latents + batch.vit_image.shape[1]  # upper bound on the images of a row
  time = flow.shift_time(jax.nn.sigmoid(jax.random.normal(time_key, (rows, images))), shift)
  timestep_BG = jnp.take_along_axis(time, jnp.maximum(batch.latent_image, 0), axis=1)
  return (jnp.where(batch.latent_weight > 0, timestep_BG, 0.0),
          jax.random.normal(noise_key, batch.latents.shape))


def _gradients(objective, params, batch, noise):
  """(gradients, sums) of a batch; with an axis of slices in front where the batch has one."""
  compute, lead = jax.grad(objective, has_aux=True), ()
  if batch.text_ids.ndim == 3:
    compute = jax.vmap(compute, in_axes=(None, 0, 0), spmd_axis_name="slice")
    lead = ("slices",)
  gradients, sums = compute(params, batch, noise)
  # Constrained: otherwise XLA may keep whole gradients on every device.
  to_master = lambda x: x.astype(jnp.float32)
  short = constrain_parameters(gradients, lead)
  return constrain_parameters(jax.tree.map(to_master, short), lead), sums


def _accumulate(gradients_of, batches, key):
  """`gradients_of` summed over the leading axis A of `batches`, one batch in memory at a time."""
  def add(so_far, numbered):
    number, batch = numbered
    new = gradients_of(batch, jax.random.fold_in(key, number))
    return jax.tree.map(jnp.add, so_far, new), None

  first = jax.tree.map(lambda x: x[0], batches)
  gradients, sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients_of, first, key))
  numbers = jnp.arange(batches.text_ids.shape[0])
  lead = ("slices",) * (_slices() > 1)
  start = constrain_parameters(gradients, lead), sums
  return jax.lax.scan(add, start, (numbers, batches))[0]


def _slices() -> int:
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape["slice"]


def _by_slice(tree):
  """Splits the rows, axis 0 of all arrays, by slice: [B, ...] -> [S, B / S, ...] for S > 1."""
  slices = _slices()
  if slices == 1:
    return tree
  return jax.tree.map(lambda x: einops.rearrange(x, "(s b) ... -> s b ...", s=slices), tree)


def _over_slices(tree):
  """Sums the results of all slices: what crosses the network between them, once an update."""
  if _slices() == 1:
    return tree
  gradients, sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)
  return constrain_parameters(gradients), sums


# --- state and optimizer (docs/spec.md, section 6)


def trained_shapes(settings: TrainSettings) -> dict:
  """Shapes of the parameters, or of the adapters, that a run trains; float32."""
  if settings.lora.rank:
    return lora.abstract_adapters(settings.model, settings.lora)
  return names.abstract_params(settings.model, jnp.float32)["transformer"]


def make_optimizer(settings: OptimizerSettings, stage: StageSettings) -> Optimizer:
  """Clipping by the global norm, then AdamW with the stage's learning rate."""
  def schedule(step):
    rise = step / stage.warmup_steps if stage.warmup_steps else 1.0
    fall = (stage.steps - step) / stage.decay_steps if stage.decay_steps else 1.0
    return stage.learning_rate * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

  return Optimizer(optax.chain(
      optax.clip_by_global_norm(settings.clip_norm),
      optax.adamw(schedule, b1=0.9, b2=0.95, eps=settings.eps,
                  weight_decay=settings.weight_decay)), schedule)


def init_state(params, optimizer: Optimizer) -> TrainState:
  """The state before the first update, from parameters of any dtype. May be jitted."""
  master = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  # Copies: the state is donated, and no buffer may be donated twice.
  copy = lambda tree: jax.tree.map(jnp.array, tree)
  return TrainState(step=jnp.zeros((), jnp.int32), params=copy(master), ema=copy(master),
                    opt_state=optimizer.transform.init(master))


def map_frozen(function, tree, frozen):
  """Applies `function` to the leaves that the names in `frozen` cover; keeps the others."""
  if not frozen:
    return tree
  pattern = re.compile("|".join(FREEZABLE[name] for name in frozen))
  covered = lambda path: pattern.match(jax.tree_util.keystr(path, simple=True, separator="/"))
  return jax.tree.map_with_path(lambda path, x: function(x) if covered(path) else x, tree)


def update(optimizer: Optimizer, state: TrainState, gradients, frozen,
           ema_decay: float) -> TrainState:
  """The state after one step of the optimizer and of the moving average.

  Gradients are float32; `frozen` are names of `FREEZABLE` that are not trained.
  """
  updates, opt_state = optimizer.transform.update(gradients, state.opt_state, state.params)
  # Zero gradients are not enough: moments and weight decay would still move the parameters.
  updates = map_frozen(jnp.zeros_like, updates, frozen)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
  return dataclasses.replace(
      state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


# --- tokens and FLOPs


def token_counts(batch) -> dict:
  """Numbers of tokens and of visible pairs in a batch: float32 by the names of `row_units`."""
  count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
  und, gen = jnp.split(batch.tokens.sample != PADDING, [batch.text_ids.shape[1]], axis=1)
  return {"und": count(und), "gen": count(gen), "vit": count(batch.vit_image != PADDING),
          "text": count(batch.text_sample != PADDING), "pairs": visible_pairs(batch.tokens),
          "vit_pairs": visible_pairs(patch_tokens(batch.vit_image))}


def usage(counts, batch) -> dict:
  """Metrics of the tokens of an update, from the sum of its `token_counts`.

  Returns:
    float32 scalars: "tokens/<kind>"; the used shares of the rows, "packing/" and the names of
    `row_units`.
  """
  und, gen, vit, text, samples = (x.shape[-1] for x in (
      batch.text_ids, batch.latent_image, batch.vit_image, batch.text_place, batch.sample_mode))
  units = row_units(BufferSizes(und=und, gen=gen, vit=vit, text=text, samples=samples))
  rows = math.prod(batch.text_ids.shape[:-1])
  shares = {f"packing/{name}": counts[name] / float(max(rows * size, 1))
            for name, size in units.items()}
  return shares | {"tokens/text": counts["und"] - counts["vit"], "tokens/latent": counts["gen"],
                   "tokens/vit": counts["vit"], "tokens/predicted": counts["text"]}


def row_units(sizes: BufferSizes) -> dict[str, int]:
  """Sizes of a row's buffers, and its number of pairs of tokens in the decoder and in the ViT."""
  return {"und": sizes.und, "gen": sizes.gen, "vit": sizes.vit, "text": sizes.text,
          "pairs": (sizes.und + sizes.gen) ** 2, "vit_pairs": sizes.vit**2}


def unit_flops(config: ModelConfig) -> dict[str, float]:
  """FLOPs of a forward pass for one token of each buffer and for one pair of tokens.

  By formula: matrix products and attention, 2 for each multiply-add.

  Returns:
    dict by the names of `row_units`; "text" is a predicted position.
  """
  llm, vit = config.llm, config.vit
  width = llm.hidden_size
  keys = llm.num_kv_heads * llm.head_dim
  layer = width * (2 * width + 2 * keys + 3 * llm.mlp_size)  # q and o, k and v, the gated MLP
  time = TIMESTEP_FEATURES * width + width**2
  vit_layer = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.mlp_size)
  return {
      "und": 2.0 * llm.num_layers * layer,
      "gen": 2.0 * (llm.num_layers * layer + 2 * config.latent_dim * width + time),
      "vit": 2.0 * (vit.num_layers * vit_layer + 3 * vit.patch_size**2 * vit.hidden_size
                    + vit.hidden_size * width + width**2),
      "text": 2.0 * width * llm.vocab_size,
      "pairs": 4.0 * llm.num_layers * width,
      "vit_pairs": 4.0 * vit.num_layers * vit.hidden_size,
  }


def row_flops(config: ModelConfig, sizes: BufferSizes, used: dict | None = None,
              adapters: lora.LoraSettings = lora.LoraSettings()) -> float:
  """FLOPs of an update for one row; the backward pass costs twice the forward pass.

  Under adapters a frozen matrix has no gradient of its own, and a ViT without adapters has no
  backward pass; the few products of the adapters do not count. Nor does recomputation.

  Args:
    used: shares by the names of `row_units`; those not given are 1.
  """
  each, used, passes = unit_flops(config), used or {}, dict.fromkeys(row_units(sizes), 3)
  if adapters.rank:
    seen = any("/vit/" in row.path for row in lora.target_rows(config, adapters))
    passes |= {"und": 2, "gen": 2, "text": 2} | ({"vit": 2} if seen else {"vit": 1, "vit_pairs": 1})
  return sum(passes[name] * count * used.get(name, 1.0) * each[name]
             for name, count in row_units(sizes).items())
