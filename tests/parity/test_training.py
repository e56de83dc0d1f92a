"""The packed training row of the reference: mask, positions, losses, gradients."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from conftest import relative_error
from irg_jax import flow
from irg_jax.data.batch import pack_row, stack_rows
from irg_jax.data.sequence import PictureSplit, TextSplit, sample_features
from irg_jax.model import attention
from irg_jax.train.loss import mean_losses, token_losses
from irg_jax.weights import names

TRAIN_SHIFT = 4.0


def read_samples(reference, config):
  """`train_samples.json` as lists of splits, with the recorded latents and patches."""
  vit_parts = iter(np.split(reference["train/packed_vit_tokens"],
                            np.cumsum(reference["train/vit_token_seqlens"])[:-1]))
  latents = zip(reference["train/padded_latent"], reference["train/latent_shapes"])
  latents = iter([_tokens(z, *shape, config.latent_patch_size) for z, shape in latents])

  def splits(split):
    if split["type"] == "text":
      return [TextSplit(split["ids"], bool(split["loss"]))]
    # The reference draws the posterior anew for each role, so each role is a split here.
    roles = [PictureSplit(next(latents), None, **{role: True})
             for role in ("need_loss", "need_vae") if split[role]]
    if split["need_vit"]:
      patch = config.vit.patch_size
      columns = round(split["w"] / patch)  # these pictures are within the size limits
      roles.append(PictureSplit(None, next(vit_parts).reshape(-1, columns, patch * patch * 3),
                                need_vit=True))
    return roles

  return [[s for split in sample for s in splits(split)]
          for sample in reference.json("train_samples.json")]


def _tokens(z, h, w, patch):
  """[channels, padded height, padded width] -> latent tokens [h, w, patch * patch * channels]."""
  z = z.transpose(1, 2, 0)[:h * patch, :w * patch]
  return z.reshape(h, patch, w, patch, -1).swapaxes(1, 2).reshape(h, w, -1)


@functools.cache
def packed(reference, model_config, special, order=None):
  samples = read_samples(reference, model_config)
  features = [sample_features(s, model_config, special) for s in samples]
  features = [features[i] for i in order or range(len(features))]
  size = lambda prefix: sum(len(f[f"{prefix}_position"]) for f in features) + 7
  return stack_rows([pack_row(features, size("und"), size("gen"), size("vit"))])


def recorded_draws(reference, batch):
  """(timestep [1, G], noise [1, G, latent_dim]) of the reference for the unpermuted row."""
  raw = reference["train/packed_timesteps"]
  t = flow.shift_time(np.asarray(jax.nn.sigmoid(raw)), TRAIN_SHIFT)
  missing = batch.latents.shape[1] - len(t)
  noise = reference["train/flow_noise"]
  return (jnp.asarray(np.pad(t, (0, missing)))[None],
          jnp.asarray(np.pad(noise, ((0, missing), (0, 0))))[None])


def test_mask_and_positions_of_the_packed_row_are_exact(reference, checkpoint):
  batch = packed(reference, checkpoint.config, checkpoint.special)
  sample, index = (np.asarray(x[0]) for x in (batch.tokens.sample, batch.tokens.index))
  mask = np.asarray(attention.allowed(batch.tokens, batch.tokens))[0]
  positions = []
  for number, length in enumerate(reference["train/sample_lens"]):
    here = np.flatnonzero(sample == number)
    here = here[np.argsort(index[here])]
    assert len(here) == length
    np.testing.assert_array_equal(mask[np.ix_(here, here)], reference[f"train/mask_{number}"])
    assert not mask[here][:, sample != number].any()
    positions.append(np.asarray(batch.position)[0][here])
  np.testing.assert_array_equal(np.concatenate(positions), reference["train/packed_position_ids"])


def test_losses_of_every_token(reference, checkpoint):
  batch = packed(reference, checkpoint.config, checkpoint.special)
  ce, error = jax.jit(token_losses, static_argnums=0)(
      checkpoint.model, checkpoint.params["transformer"], batch, *recorded_draws(reference, batch))
  ce_here = np.asarray(ce)[np.asarray(batch.text_weight) > 0]
  mse_here = np.asarray(error)[np.asarray(batch.latent_weight) > 0]
  np.testing.assert_allclose(ce_here, reference["train/ce_per_token"], rtol=1e-5)
  np.testing.assert_allclose(
      mse_here, reference["train/mse_per_token_dim"].mean(-1), rtol=1e-5)
  losses = mean_losses(ce, error, batch)
  for name in ("ce", "mse", "loss"):
    np.testing.assert_allclose(losses[name], reference[f"train/{name}"], rtol=1e-5)


def test_every_gradient(reference, checkpoint):
  batch = packed(reference, checkpoint.config, checkpoint.special)
  draws = recorded_draws(reference, batch)
  loss = lambda params: mean_losses(
      *token_losses(checkpoint.model, params, batch, *draws), batch)["loss"]
  gradient = jax.jit(jax.grad(loss))(checkpoint.params["transformer"])
  published = dict(as_published(gradient, checkpoint.config))
  norms = reference.json("train_grad_norms.json")
  assert published.keys() == norms.keys()
  # A bias of the ViT's keys shifts all logits of a query alike: its gradient is rounding.
  rounding = 1e-7 * max(norms.values())
  for key, norm in norms.items():
    np.testing.assert_allclose(np.linalg.norm(published[key]), norm, rtol=1e-4, atol=rounding,
                               err_msg=key)
  for name in reference.names("train/grad/"):
    assert relative_error(published[name.removeprefix("train/grad/")], reference[name]) < 1e-4, name


def as_published(transformer, config):
  """(published key, array in published layout) of every parameter of the transformer."""
  flat = flax.traverse_util.flatten_dict(transformer, sep="/")
  for row in names.rows(config):
    if row.path.startswith("transformer/"):
      x = np.asarray(flat[row.path.removeprefix("transformer/")])
      for key, layer in zip(row.keys, x if row.layers else [x], strict=True):
        yield key, row.to_published(layer)
