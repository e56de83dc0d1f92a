"""One update: draws, losses and gradients over a global batch, the optimizer."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import flow
from irg_jax.model.attention import visible_pairs
from irg_jax.tokens import PADDING
from irg_jax.model.decoder import unstack_layers
from irg_jax.model.vit import patch_tokens
from irg_jax.sharding import constrain_parameters, gather_parameters, partition_spec
from irg_jax.train.loss import LEAST, loss_sums, mean_losses, token_losses
from irg_jax.train.optimizer import Optimizer, map_frozen, update
from irg_jax.train.settings import Switches, TrainSettings
from irg_jax.train.state import state_shardings


def make_train_step(model, optimizer: Optimizer, settings: TrainSettings, mesh, state, batch):
  """The jitted update, its layout fixed on `mesh`.

  Args:
    model, optimizer, settings: see `train_step`.
    mesh: of `sharding.make_mesh`.
    state, batch: the arguments of the step or their shapes.

  Returns:
    `step(switches, state, batch, key) -> (state, metrics)`. `switches` is static, the state
    is donated, the metrics are whole on every device.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  states = state_shardings(state, mesh)

  def step(switches, state, batch, key):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return train_step(model, optimizer, switches, settings, state, batch, key)

  return jax.jit(step, static_argnums=0, donate_argnums=1, out_shardings=(states, whole),
                 in_shardings=(states, batch_shardings(batch, mesh), whole))


def batch_shardings(batch, mesh):
  """NamedShardings of a Batch (or of its shapes), with or without the accumulation axis."""
  lead = batch.text_ids.ndim - 2

  def sharding(path, x):
    # How many samples a row holds has nothing to do with its length.
    length = None if jax.tree_util.keystr(path).startswith(".sample_") else "length"
    axes = (None,) * lead + ("batch", length) + (None,) * (x.ndim - lead - 2)
    return NamedSharding(mesh, partition_spec(x.shape, axes, mesh))

  return jax.tree.map_with_path(sharding, batch)


def train_step(model, optimizer: Optimizer, switches: Switches, settings: TrainSettings, state,
               batch, key):
  """One update of the state.

  Args:
    model: UnifiedTransformer, whose config says the dtype of the compute.
    optimizer: the stage's.
    switches: what is frozen, and which losses are trained on.
    settings: time shift, weights of the losses, decay of the average.
    state: TrainState.
    batch: Batch; under accumulation with a leading axis A of batches that make one update.
    key: of the stage. The draws depend on it, on the step and on the batch's shape alone.

  Returns:
    (state, metrics: dict of float32 scalars).
  """
  key = jax.random.fold_in(key, state.step)
  params = cast_kernels(state.params, model.config.dtype)
  # Means over all batches of the update, so the divisors come before the first loss.
  divisors = {name: jnp.maximum(jnp.sum(weight), LEAST) for name, weight in
              (("ce", batch.text_weight), ("mse", batch.latent_weight))}

  def objective(params, part, key):
    params = map_frozen(jax.lax.stop_gradient, params, switches.frozen)
    if model.config.remat == "none":  # the scan is what recomputes layer by layer
      params = unstack_layers(params)
    sums = loss_sums(*token_losses(model, params, part, *draw(part, key, settings.timestep_shift)),
                     part)
    loss = total({name: sums[name] / divisors[name] for name in switches.losses}, settings)
    return loss, sums | token_counts(part)

  if batch.text_ids.ndim == 2:
    gradients, sums = _gradients(objective, params, batch, key)
  else:
    gradients, sums = _accumulate(objective, params, batch, key)
  metrics = mean_losses(sums)
  metrics |= {"loss": total(metrics, settings), "grad_norm": optax.tree.norm(gradients),
              "learning_rate": jnp.asarray(optimizer.schedule(state.step), jnp.float32)}
  metrics |= {name: x for name, x in sums.items() if name.startswith("tokens/")}
  metrics |= packing(sums, batch)
  return update(optimizer, state, gradients, switches.frozen, settings.ema_decay), metrics


def total(means, settings: TrainSettings):
  """The weighted sum of the losses that are in `means`."""
  weights = {"ce": settings.ce_weight, "mse": settings.mse_weight}
  return sum((weight * means[name] for name, weight in weights.items() if name in means),
             jnp.zeros(()))


def cast_kernels(params, dtype):
  """Matrices and embeddings in the dtype of the compute; scales and biases stay float32.

  Once a step and in the parameters' own layout, so that what is gathered over the mesh is
  the short form.
  """
  is_matrix = lambda path: path[-1].key in ("kernel", "embedding")
  return gather_parameters(constrain_parameters(jax.tree.map_with_path(
      lambda path, x: x.astype(dtype) if is_matrix(path) else x, params)))


def draw(batch, key, shift):
  """Flow times and noise of a batch (spec section 4).

  Returns:
    (timestep float32 [B, G], one for each image and 0 on clean ones; standard normal noise
    float32 [B, G, latent_dim]).
  """
  times, noise = jax.random.split(key)
  rows, latents = batch.latent_image.shape
  most = latents + batch.vit_image.shape[1]  # images in a row
  normal = jax.random.normal(times, (rows, most))
  t = flow.shift_time(jax.nn.sigmoid(normal), shift)
  t = jnp.take_along_axis(t, jnp.maximum(batch.latent_image, 0), axis=1)
  return (jnp.where(batch.latent_weight > 0, t, 0.0),
          jax.random.normal(noise, batch.latents.shape))


def _gradients(objective, params, batch, key):
  gradients, sums = jax.grad(objective, has_aux=True)(params, batch, key)
  # Pinned: left alone, XLA may keep whole gradients on every device.
  to_master = lambda x: x.astype(jnp.float32)
  return constrain_parameters(jax.tree.map(to_master, constrain_parameters(gradients))), sums


def _accumulate(objective, params, batches, key):
  """Sums over the leading axis of `batches`, one batch in memory at a time."""
  def add(so_far, numbered):
    number, batch = numbered
    new = _gradients(objective, params, batch, jax.random.fold_in(key, number))
    return jax.tree.map(jnp.add, so_far, new), None

  first = jax.tree.map(lambda x: x[0], batches)
  shapes = jax.eval_shape(functools.partial(_gradients, objective), params, first, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  zeros = constrain_parameters(zeros[0]), zeros[1]
  numbers = jnp.arange(batches.text_ids.shape[0])
  return jax.lax.scan(add, zeros, (numbers, batches))[0]


def token_counts(batch) -> dict:
  """How much of each buffer and of all pairs is used, in float32: "used/..."; tokens by kind."""
  count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
  und, gen = jnp.split(batch.tokens.sample != PADDING, [batch.text_ids.shape[1]], axis=1)
  vit = count(batch.vit_image != PADDING)
  used = {"und": count(und), "gen": count(gen), "vit": vit,
          "text": count(batch.text_sample != PADDING), "pairs": visible_pairs(batch.tokens),
          "vit_pairs": visible_pairs(patch_tokens(batch.vit_image))}
  return {f"used/{name}": x for name, x in used.items()} | {
      "tokens/text": used["und"] - vit, "tokens/latent": used["gen"], "tokens/vit": vit,
      "tokens/predicted": used["text"]}


def packing(sums, batch) -> dict:
  """Share of each buffer that is used, "packing/<buffer>", and of pairs that see each other."""
  sizes = {"und": batch.text_ids.size, "gen": batch.latent_image.size,
           "vit": batch.vit_image.size, "text": batch.text_place.size,
           "pairs": batch.position.size * batch.position.shape[-1],
           "vit_pairs": batch.vit_image.size * batch.vit_image.shape[-1]}
  return {f"packing/{name}": sums[f"used/{name}"] / float(max(size, 1))
          for name, size in sizes.items()}
