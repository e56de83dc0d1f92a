"""The packed training row of the reference: mask, positions, losses, gradients."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import relative_error
from irg_jax import flow
from irg_jax.data.batch import LENGTH_FEATURES, BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.train.loss import loss_sums, mean_losses, token_losses
from irg_jax.weights import names
from irg_jax.tokens import allowed

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
    roles = [ImageSplit(next(latents), None, **{role: True})
             for role in ("need_loss", "need_vae") if split[role]]
    if split["need_vit"]:
      patch = config.vit.patch_size
      columns = round(split["w"] / patch)  # these images are within the size limits
      roles.append(ImageSplit(None, next(vit_parts).reshape(-1, columns, patch * patch * 3),
                                need_vit=True))
    return roles

  return [[s for split in sample for s in splits(split)]
          for sample in reference.json("train_samples.json")]


def _tokens(z, h, w, patch):
  """[channels, padded height, padded width] -> latent tokens [h, w, patch * patch * channels]."""
  z = z.transpose(1, 2, 0)[:h * patch, :w * patch]
  return z.reshape(h, patch, w, patch, -1).swapaxes(1, 2).reshape(h, w, -1)


@functools.cache
def features(reference, model_config, special, reweighting=False):
  """The features of each sample, all in the first mode."""
  return [sample_features(s, model_config, special, index=i, ce_loss_reweighting=reweighting)
          for i, s in enumerate(read_samples(reference, model_config))]


def one_row(reference, checkpoint, **kwargs):
  """All samples in one row, in order."""
  samples = features(reference, checkpoint.config, checkpoint.special, **kwargs)
  return pack(samples, [range(len(samples))])


def pack(samples, rows, room=7):
  """A Batch of the samples with the numbers in `rows`, in buffers with some room to spare."""
  longest = lambda name: max(sum(len(samples[i][name]) for i in row) for row in rows)
  sizes = BufferSizes(samples=max(map(len, rows)) + 1, **{
      buffer: longest(name) + room for buffer, name in LENGTH_FEATURES.items()
      if buffer != "samples"})
  return stack_rows([pack_row([samples[i] for i in row], sizes) for row in rows])


def recorded_draws(reference, batch):
  """(timestep [B, G], noise [B, G, latent_dim]) of the reference, wherever its samples lie."""
  raw = reference["train/packed_timesteps"]
  t = flow.shift_time(np.asarray(jax.nn.sigmoid(raw)), TRAIN_SHIFT)
  sample = np.asarray(batch.tokens.sample)[:, batch.text_ids.shape[1]:]
  index = np.asarray(batch.sample_index)
  timestep, noise = np.zeros(sample.shape, np.float32), np.zeros(batch.latents.shape, np.float32)
  start = 0
  for number in range(index.max() + 1):  # the records count through the samples in order
    row, column = np.argwhere(index == number)[0]
    here = np.flatnonzero(sample[row] == column)
    recorded = slice(start, start + len(here))
    timestep[row, here], noise[row, here] = t[recorded], reference["train/flow_noise"][recorded]
    start += len(here)
  assert start == len(t)
  return jnp.asarray(timestep), jnp.asarray(noise)


def test_mask_and_positions_of_the_packed_row_are_exact(reference, checkpoint):
  batch = one_row(reference, checkpoint)
  sample, index = (np.asarray(x[0]) for x in (batch.tokens.sample, batch.tokens.index))
  mask = np.asarray(allowed(batch.tokens, batch.tokens))[0]
  positions = []
  for number, length in enumerate(reference["train/sample_lens"]):
    here = np.flatnonzero(sample == number)
    here = here[np.argsort(index[here])]
    assert len(here) == length
    np.testing.assert_array_equal(mask[np.ix_(here, here)], reference[f"train/mask_{number}"])
    assert not mask[here][:, sample != number].any()
    positions.append(np.asarray(batch.position)[0][here])
  np.testing.assert_array_equal(np.concatenate(positions), reference["train/packed_position_ids"])


def losses(checkpoint, batch, draws):
  """(ce, mse error of every token, dict of the means)."""
  ce, error = jax.jit(token_losses, static_argnums=0)(
      checkpoint.model, checkpoint.params["transformer"], batch, *draws)
  means = mean_losses(loss_sums(ce, error, batch))
  return ce, error, means | {"loss": means["ce"] + means["mse"]}


def test_losses_of_every_token(reference, checkpoint):
  batch = one_row(reference, checkpoint)
  ce, error, means = losses(checkpoint, batch, recorded_draws(reference, batch))
  ce_here = np.asarray(ce)[np.asarray(batch.text_weight) > 0]
  mse_here = np.asarray(error)[np.asarray(batch.latent_weight) > 0]
  np.testing.assert_allclose(ce_here, reference["train/ce_per_token"], rtol=1e-5)
  np.testing.assert_allclose(
      mse_here, reference["train/mse_per_token_dim"].mean(-1), rtol=1e-5)
  for name in ("ce", "mse", "loss"):
    np.testing.assert_allclose(means[name], reference[f"train/{name}"], rtol=1e-5)


@pytest.mark.parametrize("rows", ["backwards", "two rows", "a row each"])
def test_neither_order_nor_rows_change_the_losses(reference, checkpoint, rows):
  samples = features(reference, checkpoint.config, checkpoint.special)
  n = len(samples)
  rows = {"backwards": [range(n)[::-1]], "two rows": [range(1, n, 2), range(0, n, 2)],
          "a row each": [[i] for i in range(n)]}[rows]
  batch = pack(samples, rows, room=3)
  means = losses(checkpoint, batch, recorded_draws(reference, batch))[-1]
  for name in ("ce", "mse", "loss"):
    np.testing.assert_allclose(means[name], reference[f"train/{name}"], rtol=1e-5)


def test_reweighted_cross_entropy(reference, checkpoint):
  batch = one_row(reference, checkpoint, reweighting=True)
  means = losses(checkpoint, batch, recorded_draws(reference, batch))[-1]
  np.testing.assert_allclose(means["ce"], reference["train/ce_reweighted"], rtol=1e-5)


def test_every_gradient(reference, checkpoint):
  batch = one_row(reference, checkpoint)
  draws = recorded_draws(reference, batch)

  def loss(params):
    means = mean_losses(loss_sums(*token_losses(checkpoint.model, params, batch, *draws), batch))
    return means["ce"] + means["mse"]

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
