"""Compiled programs: log-probabilities of trajectories under a policy, and the update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax.rl import objective, sampler
from irg_jax.rl.batches import Rows
from irg_jax.rl.settings import RlSettings
from irg_jax.sharding import constrain_parameters, parameter_shardings, partition_spec
from irg_jax.train.loss import TEXT_CHUNK, cross_entropy, predictions
from irg_jax.train.step import (
    Optimizer, TrainState, batch_shardings, cast_kernels, map_frozen, update)
from irg_jax.weights import lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """Log-probabilities and velocities of a policy on the rows of a batch.

  On tokens that were not sampled they are 0 or anything.
  """

  text: jax.Array  # float32 [B, E], log-probability of each token at the temperature
  steps: jax.Array  # float32 [B, I], mean log-density of each stochastic step
  velocity: jax.Array  # float32 [B, G, latent_dim]


def measure(model, params, rows: Rows, settings: RlSettings) -> tuple[Measured, jax.Array]:
  """(`Measured` of rows [B, ...], entropy of the tokens' distributions float32 [B, E])."""
  batch = rows.batch
  und_BUD, velocity_BGC = model.apply({"params": params}, batch, batch.latents, rows.time)
  logits = lambda hidden: model.apply({"params": params}, hidden, method="text_logits") / (
      settings.rollout.temperature or 1.0)
  ce_BE, entropy_BE = predictions(logits, _token_terms, und_BUD, batch.text_place,
                                  batch.text_target, TEXT_CHUNK)
  mean_BGC, std_BG1 = sampler.moments(batch.latents, velocity_BGC, *_times(rows),
                                      settings.image.noise)
  density_BG = jnp.mean(sampler.log_density(rows.after, mean_BGC, std_BG1), -1)
  return Measured(text=-ce_BE, steps=_of_steps(density_BG, rows), velocity=velocity_BGC), entropy_BE


def _token_terms(logits_BEV, target_BE):
  """(cross-entropy of the targets, entropy of the distributions) [B, E]; the latter for logs."""
  log_BEV = jax.nn.log_softmax(jax.lax.stop_gradient(logits_BEV))
  return cross_entropy(logits_BEV, target_BE), -jnp.sum(jnp.exp(log_BEV) * log_BEV, -1)


def _times(rows):
  """Times before and after the steps [B, G, 1]; on clean tokens any that a step can have."""
  own = rows.step >= 0
  return (jnp.where(own, x, other)[..., None]
          for x, other in ((rows.time, 0.5), (rows.next_time, 0.25)))


def _of_steps(values_BG, rows):
  """Means over the tokens of each stochastic step, [B, I]."""
  hit_BGI = (rows.step[..., None] == jnp.arange(rows.step_weight.shape[-1])).astype(jnp.float32)
  count_BI = jnp.maximum(jnp.sum(hit_BGI, 1), 1)
  return jnp.einsum("bg,bgi->bi", jnp.where(rows.step >= 0, values_BG, 0.0), hit_BGI) / count_BI


def losses(now: Measured, entropy_BE, old: Measured, reference: Measured, rows: Rows, totals,
           settings: RlSettings):
  """(loss, metrics) of rows [B, ...]; their sums over all rows of an update are its means.

  Args:
    old: as the trajectories were sampled.
    reference: as `old`; anything where no divergence is measured.
    totals: {"text", "image"}: sums of the weights of all rows of the update.
  """
  found, loss = {}, jnp.zeros(())
  velocity_BG = jnp.mean((now.velocity - reference.velocity) ** 2, -1)
  if settings.image.measure == "step":
    velocity_BG *= sampler.divergence_scale(*_times(rows), settings.image.noise)[..., 0]
  tracks = (
      ("text", settings.text, now.text - old.text, rows.text_weight, rows.text_advantage,
       objective.token_divergence(now.text, reference.text)),
      ("image", settings.image, now.steps - old.steps, rows.step_weight, rows.step_advantage,
       _of_steps(velocity_BG, rows)))
  for name, track, log_ratio, weight, advantage, divergence in tracks:
    if not track.weight:
      continue
    mean = functools.partial(objective.weighted_mean, weights=weight, total=totals[name])
    log_ratio = jnp.where(weight > 0, log_ratio, 0.0)
    found[f"loss/{name}"] = mean(objective.clipped_loss(log_ratio, advantage, track.clip))
    loss += track.weight * found[f"loss/{name}"]
    if track.divergence:
      found[f"divergence/{name}"] = mean(divergence)
      loss += track.divergence * found[f"divergence/{name}"]
    ratio = jnp.exp(log_ratio)
    found[f"clipped/{name}"] = mean((jnp.abs(ratio - 1) > track.clip).astype(jnp.float32))
    found[f"ratio_off/{name}"] = mean(jnp.abs(ratio - 1))
  if settings.text.weight:
    found["entropy"] = objective.weighted_mean(entropy_BE, rows.text_weight, totals["text"])
  return loss, found | {"loss": loss}


def rl_step(model, optimizer: Optimizer, settings: RlSettings, state: TrainState, rows: Rows,
            old: Measured, reference: Measured, fresh, base=None):
  """One update of the state.

  Args:
    rows, old, reference: [A, B, ...], of which A parts are computed one after the other.
    fresh: bool scalar, no update was made since the trajectories were sampled: `old` is then what
      this program itself finds, so that all ratios are exactly 1.
    base: the frozen parameters whose adapters the state holds; None: it holds the parameters.

  Returns:
    (state, metrics: dict of float32 scalars).
  """
  params = cast_kernels(state.params, model.config.dtype)
  base = {} if base is None else cast_kernels(base, model.config.dtype)
  totals = {"text": jnp.sum(rows.text_weight), "image": jnp.sum(rows.step_weight)}

  def compute(params, part):
    rows, old, reference = part
    params = map_frozen(jax.lax.stop_gradient, params, settings.freeze)
    with lora.applied(settings.lora.scale):
      now, entropy_BE = measure(model, lora.beside(base, params), rows, settings)
    old = jax.tree.map(lambda was, x: jnp.where(fresh, jax.lax.stop_gradient(x), was), old, now)
    return losses(now, entropy_BE, old, reference, rows, totals, settings)

  def add(so_far, part):
    gradients, metrics = jax.grad(compute, has_aux=True)(params, part)
    gradients = constrain_parameters(gradients)
    new = constrain_parameters(jax.tree.map(lambda x: x.astype(jnp.float32), gradients)), metrics
    return jax.tree.map(jnp.add, so_far, new), None

  parts = rows, old, reference
  first = jax.tree.map(lambda x: x[0], parts)
  metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, params, first)[1])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
  (gradients, metrics), _ = jax.lax.scan(add, (constrain_parameters(zeros), metrics), parts)
  metrics |= {"grad_norm": optax.tree.norm(gradients),
              "learning_rate": jnp.asarray(optimizer.schedule(state.step), jnp.float32)}
  return update(optimizer, state, gradients, settings.freeze, settings.ema_decay), metrics


def make_update(model, optimizer: Optimizer, settings: RlSettings, mesh, state, rows, old, *base):
  """The jitted `rl_step`, for arrays of the given shapes on a mesh.

  Returns:
    `update(state, rows, old, reference, fresh, *base) -> (state, metrics)`; the state is donated,
    the metrics are replicated.
  """
  replicated, states = NamedSharding(mesh, PartitionSpec()), parameter_shardings(state, mesh)
  placed = row_shardings((rows, old), mesh)

  def step(state, rows, old, reference, fresh, *base):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return rl_step(model, optimizer, settings, state, rows, old, reference, fresh, *base)

  return jax.jit(step, donate_argnums=0, out_shardings=(states, replicated), in_shardings=(
      states, *placed, placed[1], replicated, *(parameter_shardings(x, mesh) for x in base)))


def make_measure(model, settings: RlSettings, mesh):
  """The jitted `measure`: (params or adapters, rows [A, B, ...], *base) -> `Measured` likewise."""
  def run(params, rows, *base):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), lora.applied(settings.lora.scale):
      cast = lambda tree: cast_kernels(tree, model.config.dtype)
      params = lora.beside(cast(base[0]), cast(params)) if base else cast(params)
      return jax.lax.map(lambda part: measure(model, params, part, settings)[0], rows)

  return jax.jit(run)


def row_shardings(trees, mesh):
  """NamedShardings of trees of Rows or Measured [A, B, ...], or of their shapes."""
  rows = lambda x: NamedSharding(mesh, partition_spec(
      x.shape, (None, "global_batch") + (None,) * (x.ndim - 2), mesh))

  def placed(tree):
    found = jax.tree.map(rows, tree)
    return dataclasses.replace(found, batch=batch_shardings(tree.batch, mesh)) if isinstance(
        tree, Rows) else found

  return tuple(map(placed, trees))
