"""The unified transformer: masking, unused experts, rematerialisation, parameters, dtypes."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.tokens import NOISE, PADDING, Tokens
from irg_jax.model.layers import apply_rope, rope_table, sincos_2d, timestep_features
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.model.vae import Vae
from irg_jax.weights import names

CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=32, hidden_size=16, mlp_size=24, num_layers=2, num_heads=4,
                  num_kv_heads=2),
    vit=VitConfig(hidden_size=8, mlp_size=12, num_layers=1, num_heads=2, patch_size=2, grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=2),
    max_latent_size=4)
SPECIAL = SpecialTokens(text_start=28, text_end=29, image_start=30, image_end=31)
U, G, P = 44, 14, 9  # buffers that hold the two samples below and some padding


@functools.cache
def random_params():
  """Random in every leaf: zero biases and unit scales would hide one that is never used."""
  rng = np.random.default_rng(0)
  draw = lambda x: (rng.standard_normal(x.shape) * 0.3).astype(np.float32)
  return jax.tree.map(draw, names.abstract_params(CONFIG, jnp.float32)["transformer"])


def image(seed, **roles):
  rng = np.random.default_rng(seed)
  return ImageSplit(rng.standard_normal((2, 2, CONFIG.latent_dim), np.float32),
                      rng.standard_normal((2, 2, 12), np.float32), **roles)


def samples():
  """An image that is target and condition between two texts; an edited image."""
  first = [TextSplit([1, 2, 3]), image(0, need_loss=True, need_vae=True, need_vit=True),
           TextSplit([4, 5], need_loss=True)]
  second = [image(1, need_vit=True), TextSplit([6], need_loss=True), image(2, need_loss=True)]
  return [sample_features(s, CONFIG, SPECIAL) for s in (first, second)]


def one_row(parts):
  return stack_rows([pack_row(parts, BufferSizes(und=U, gen=G, vit=P, text=10, samples=3))])


@functools.partial(jax.jit, static_argnames="config")
def outputs(params, batch, latents, *, config=CONFIG):
  """(logits, velocity) with flow time 0.6 on the targets."""
  return UnifiedTransformer(config).apply(
      {"params": params}, batch, latents, 0.6 * batch.latent_weight, method=all_outputs)


def all_outputs(model, *args):
  """Logits of every und token, velocity."""
  und, velocity = model(*args)
  return model.text_logits(und), velocity


def outputs_of(sample, batch, latents=None):
  """The outputs of one sample of a row of `batch`, in the order of its tokens."""
  latents = batch.latents if latents is None else latents
  number = batch.tokens.sample[0]
  places = number[:U] == sample, number[U:] == sample
  return [np.asarray(x)[0][place] for x, place in
          zip(outputs(random_params(), batch, latents), places)]


def test_noised_image_is_invisible_to_all_but_itself():
  batch = one_row(samples())
  before = outputs(random_params(), batch, batch.latents)
  noised = batch.latents + batch.latent_weight[..., None]
  after = outputs(random_params(), batch, noised)
  kinds = jnp.split(jnp.where(batch.tokens.sample == PADDING, PADDING, batch.tokens.kind), [U], 1)
  for name, a, b, kind in zip(("logits", "velocity"), before, after, kinds):
    changed = np.asarray(jnp.any(a != b, axis=-1))
    np.testing.assert_array_equal(changed, kind == NOISE, err_msg=name)


def test_sample_does_not_depend_on_what_is_packed_beside_it():
  a, b = samples()
  together, swapped, alone = one_row([a, b]), one_row([b, a]), one_row([a])
  want = outputs_of(0, together)
  assert len(want[0]) == len(a["und_ids"]) and len(want[1]) == len(a["gen_place"])
  for got in (outputs_of(1, swapped), outputs_of(0, alone)):
    for x, y in zip(got, want):
      np.testing.assert_allclose(x, y, atol=2e-5)


def test_contents_of_another_sample_and_of_padding_change_nothing():
  batch = one_row(samples())
  other_und, other_gen = np.split(batch.tokens.sample != 0, [U], axis=1)
  other_vit = (batch.vit_image != batch.vit_image[0, 0])
  changed = dataclasses.replace(
      batch, text_ids=np.where(other_und, 7, batch.text_ids),
      vit_patches=np.where(other_vit[..., None], 9.0, batch.vit_patches))
  latents = np.where(other_gen[..., None], 5.0, batch.latents)
  assert other_und.sum() > 12 and other_gen.sum() > 4 and other_vit.sum() > 4
  for x, y in zip(outputs_of(0, changed, latents), outputs_of(0, batch)):
    np.testing.assert_array_equal(x, y)


def test_rows_of_words_alone_need_no_room_for_images():
  sample = sample_features([TextSplit([1, 2, 3]), TextSplit([4, 5], need_loss=True)], CONFIG, SPECIAL)

  def logits_and_gradient(gen, vit):
    sizes = BufferSizes(und=12, gen=gen, vit=vit, text=4, samples=1)
    batch = stack_rows([pack_row([sample], sizes)])
    def total(params):
      logits, _ = outputs(params, batch, batch.latents)
      return jnp.sum(jnp.sin(logits[0, :9])), logits[0, :9]
    return jax.jit(jax.value_and_grad(total, has_aux=True))(random_params())

  ((_, wide), wide_gradient), ((_, none), none_gradient) = (
      logits_and_gradient(G, P), logits_and_gradient(0, 0))
  np.testing.assert_allclose(none, wide, rtol=1e-5, atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
               none_gradient, wide_gradient)


@pytest.mark.parametrize("present, absent", [("und", "gen"), ("gen", "und")])
def test_expert_whose_buffer_is_left_out_is_not_run(present, absent):
  """Its parameters need not exist."""
  def decode(params, names):
    zero = jnp.zeros((1, 3 * len(names)), jnp.int32)
    x = {name: jnp.ones((1, 3, CONFIG.llm.hidden_size)) for name in names}
    return UnifiedTransformer(CONFIG).apply(
        {"params": params}, x, Tokens(zero, zero, zero, zero), zero, method="decode")

  leaves = names.flatten(random_params())
  kept = {path: x for path, x in leaves.items()
          if f"layers/{absent}/" not in path and f"{absent}_norm" not in path}
  assert 0 < len(kept) < len(leaves)
  buffers, _ = jax.eval_shape(lambda p: decode(p, [present]), names.unflatten(kept))
  assert set(buffers) == {present}
  with pytest.raises(flax.errors.ScopeParamNotFoundError):
    jax.eval_shape(lambda p: decode(p, [present, absent]), names.unflatten(kept))


def loss_and_gradients(remat, part):
  """Jitted function of the parameters, through all layers of "vit" or of "decode"."""
  model = UnifiedTransformer(dataclasses.replace(CONFIG, remat=remat))
  batch = one_row(samples())
  inputs = {
      "vit": (batch.vit_patches, batch.vit_position, batch.vit_image),
      "decode": ({"und": jnp.ones((1, U, CONFIG.llm.hidden_size)),
                  "gen": jnp.ones((1, G, CONFIG.llm.hidden_size))}, batch.tokens, batch.position)}
  def loss(params):
    method = {"vit": "encode_vit", "decode": "decode"}[part]
    out = model.apply({"params": params}, *inputs[part], method=method)
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))
  return jax.jit(jax.value_and_grad(loss))


def test_rematerialisation_changes_neither_loss_nor_gradients():
  loss, gradients = loss_and_gradients("none", "vit")(random_params())
  assert all(np.any(x) for path, x in names.flatten(gradients["vit"]).items()
             if not path.endswith("k/bias"))  # shifts all logits of a query alike
  for remat in ("full", "attention", "dots_saveable"):
    other_loss, other = loss_and_gradients(remat, "vit")(random_params())
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
                 other, gradients)


@pytest.mark.parametrize("part", ["vit", "decode"])
def test_rematerialisation_recomputes_what_its_policy_says(part):
  products = {
      remat: loss_and_gradients(remat, part).lower(random_params()).as_text().count("dot_general")
      for remat in ("none", "dots_saveable", "full")}
  assert products["none"] == products["dots_saveable"] < products["full"]


def abstract_init(config):
  """Shapes of the parameters that `init` makes, without making any."""
  shape = jax.ShapeDtypeStruct
  row = sample_features([image(0, need_vae=True, need_vit=True)], CONFIG, SPECIAL)
  batch = stack_rows([pack_row([row], BufferSizes(und=8, gen=4, vit=4, text=1, samples=1))])
  batch = dataclasses.replace(
      batch, vit_patches=shape((1, 4, config.vit.patch_size**2 * 3), jnp.float32))
  latents = shape((1, 4, config.latent_dim), jnp.float32)
  init = functools.partial(UnifiedTransformer(config).init, method=all_outputs)
  return jax.eval_shape(init, jax.random.key(0), batch, latents, batch.latent_weight)["params"]


def test_7b_config_has_the_published_number_of_parameters():
  params = abstract_init(ModelConfig())
  parts = {"decoder": params["decoder"], "embed": params["embed"], "text": params["heads"]["text"]}
  count = sum(np.prod(x.shape) for x in jax.tree.leaves(parts))
  assert 14.1e9 < count < 14.7e9


@pytest.mark.parametrize("config", [CONFIG, ModelConfig(param_dtype="bfloat16")],
                         ids=["tiny", "7B"])
def test_modules_create_exactly_the_parameters_of_the_weights_table(config):
  pixels = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  vae = jax.eval_shape(Vae(config.vae, param_dtype=config.param_dtype).init, jax.random.key(0),
                       pixels)["params"]
  made = names.flatten({"transformer": abstract_init(config), "vae": vae})
  table = names.flatten(names.abstract_params(config, config.param_dtype))
  describe = lambda leaves: {path: (x.shape, x.dtype) for path, x in leaves.items()}
  assert describe(made) == describe(table)


def test_bfloat16_model_stays_near_and_predicts_in_float32():
  batch = one_row(samples())
  bf16 = dataclasses.replace(CONFIG, dtype="bfloat16")
  got = outputs(random_params(), batch, batch.latents, config=bf16)
  want = outputs(random_params(), batch, batch.latents)
  for name, x, y in zip(("logits", "velocity"), got, want):
    assert x.dtype == jnp.float32, name
    assert 1e-4 < relative_error(x, y) < 0.05, name


def test_sincos_position_worked_out_by_hand():
  """Cell 6 of a grid of side 4 is row 1, column 2; frequencies of width 8 are 1 and 1/100."""
  sin, cos = np.sin, np.cos
  want = [sin(2), sin(0.02), cos(2), cos(0.02), sin(1), sin(0.01), cos(1), cos(0.01)]
  np.testing.assert_allclose(sincos_2d(jnp.array(6), 4, 8), want, rtol=1e-5)


def test_timestep_features_worked_out_by_hand():
  """Cosines first; frequencies of 4 features are 1 and 1/100; t is not scaled."""
  want = [np.cos(0.5), np.cos(0.005), np.sin(0.5), np.sin(0.005)]
  np.testing.assert_allclose(timestep_features(jnp.array(0.5), 4), want, rtol=1e-5)
  assert timestep_features(jnp.zeros((2, 3))).shape == (2, 3, 256)


def rotated(x, position, theta=100.0):
  x = jnp.asarray(x, jnp.float32)
  return apply_rope(x[None, None], *rope_table(jnp.array([position]), x.shape[-1], theta))[0, 0]


def test_rotary_embedding_turns_pairs_half_a_head_apart():
  """Head dim 4, theta 100: the pairs (0, 2) and (1, 3) turn by p and p / 10."""
  np.testing.assert_allclose(
      rotated([1.0, 2.0, 0.0, 0.0], 3), [np.cos(3), 2 * np.cos(0.3), np.sin(3), 2 * np.sin(0.3)],
      rtol=1e-5)


def test_rotary_embedding_keeps_norms_and_knows_relative_position_alone():
  q, k = np.random.default_rng(0).standard_normal((2, 8), np.float32)
  dot = lambda i, j: float(rotated(q, i) @ rotated(k, j))
  np.testing.assert_allclose(jnp.linalg.norm(rotated(q, 57)), np.linalg.norm(q), rtol=1e-5)
  np.testing.assert_allclose([dot(12, 5), dot(107, 100)], dot(7, 0), rtol=1e-4)
  np.testing.assert_allclose(dot(4, 4), q @ k, rtol=1e-4)
  assert abs(dot(7, 0) - dot(0, 7)) > 1e-2
