"""Two rounds of the reference, phase by phase from its recorded inputs, then end to end."""

import functools

import jax
import numpy as np
import pytest

from conftest import relative_error
from irg_jax import flow
from irg_jax.config import SpecialTokens
from irg_jax.generate import answer, irg, steps
from irg_jax.generate.context import FULL, NO_TEXT, fork, guidance_views
from irg_jax.generate.settings import Guidance, Sampling, Settings
from irg_jax.images import ImageTransform

GREEDY = Sampling(temperature=0)


class IdTokenizer:
  """Stands in for a tokenizer where the vectors are ids: "text" is a sequence of ids."""

  def __init__(self, special: SpecialTokens):
    self.special = special

  def encode(self, text):
    return [int(i) for i in text]

  def decode(self, ids):
    return tuple(int(i) for i in ids)


def settings_of(reference, checkpoint) -> Settings:
  recorded = reference.json("irg_settings.json")
  first, later = recorded["turn1"], recorded["turn2"]
  assert first["num_timesteps"] == later["num_timesteps"]
  assert first["timestep_shift"] == later["timestep_shift"]
  height, width = (int(x) for x in reference["irg/image_hw"])
  longest = max(len(reference[f"irg/think{number}_ids"]) for number in (1, 2))
  stride = checkpoint.config.pixel_stride
  side = checkpoint.config.vit.grid_size * checkpoint.config.vit.patch_size
  return Settings(
      height=height, width=width, steps=first["num_timesteps"], temperature=0.0,
      timestep_shift=first["timestep_shift"], think_limit=longest + 1,  # counts the start token
      max_prompt_tokens=len(reference["irg/prompt_ids"]),
      first=_guidance(first), later=_guidance(later),
      vae_transform=ImageTransform(max(height, width), min(height, width), stride),
      vit_transform=ImageTransform(side, 2 * checkpoint.config.vit.patch_size,
                                   checkpoint.config.vit.patch_size))


def _guidance(turn):
  return Guidance(text_scale=turn["cfg_text_scale"], image_scale=turn.get("cfg_img_scale", 1.0),
                  interval=tuple(turn["cfg_interval"]), renorm=turn["cfg_renorm_type"],
                  renorm_min=turn["cfg_renorm_min"])


def job_of(reference, checkpoint, **changes):
  """The recorded run as what `irg.generate` would make of it."""
  fields = dict(
      model=checkpoint.model, params=checkpoint.params,
      tokenizer=IdTokenizer(checkpoint.special), settings=settings_of(reference, checkpoint),
      seeds=[0], system_ids=reference["irg/system_ids"].tolist(),
      prompt_ids=[reference["irg/prompt_ids"].tolist()], images=(),
      noise=recorded_noise(reference), on_progress=None)
  return irg.Job(**(fields | changes))


def recorded_noise(reference):
  """The reference's draws, repeated for every row."""
  def noise(kind, number, shape):
    if kind == "noise":
      return np.broadcast_to(reference[f"irg/noise{number + 1}"], shape)
    return np.broadcast_to(
        reference[f"irg/vae_encode_noise{number + 1}"].transpose(0, 2, 3, 1), shape)

  return noise


def thoughts_of(reference, number):
  return [irg.Thought(ids=tuple(reference[f"irg/think{number}_ids"].tolist()))]


def context_before_image(reference, checkpoint, number):
  """The context as the reference had it before it drew image `number`, with its views."""
  job = job_of(reference, checkpoint)
  ctx = irg.begin(job)
  ctx = irg.read_thoughts(job, ctx, thoughts_of(reference, 1), after_image=False)
  if number == 2:
    ctx = look_at_image1(reference, job, ctx)
    ctx = fork(ctx, FULL, NO_TEXT)
    ctx = irg.read_thoughts(job, ctx, thoughts_of(reference, 2), after_image=True)
  return job, ctx


def look_at_image1(reference, job, ctx):
  return irg.look(job, ctx, irg.encode(job, reference["irg/image1"][None], 0))


def check_cache(reference, ctx, name, order):
  """Compares keys and values, given the slot of each token in the reference's order."""
  for recorded in reference.names(f"irg/{name}/"):  # ends in k or v and the layer, as in k2
    part, layer = recorded.rsplit("/", 1)[1][0], int(recorded.rsplit("/", 1)[1][1:])
    got = np.asarray(getattr(ctx, part))[layer, 0].swapaxes(0, 1)[order]  # slots first
    assert relative_error(got, reference[recorded]) < 1e-5, recorded


def test_cache_after_system_prompt_and_thought(reference, checkpoint):
  _, ctx = context_before_image(reference, checkpoint, 1)
  length, position = reference["irg/kv_len_before_image1"]
  assert (int(ctx.length[0]), int(ctx.position[0, FULL])) == (length, position)
  check_cache(reference, ctx, "kv_before_image1", np.arange(length))


def test_cache_after_the_first_image(reference, checkpoint):
  job, ctx = context_before_image(reference, checkpoint, 1)
  start = int(ctx.length[0])
  ctx = look_at_image1(reference, job, ctx)
  length, position = reference["irg/kv_len_after_image1"]
  assert (int(ctx.length[0]), int(ctx.position[0, FULL])) == (length, position)
  # Slots hold [und | gen]; the reference has the latents between their two ends.
  latents = reference["irg/noise1"].shape[0]
  und = length - start - latents
  image = [0, *range(und, und + latents), *range(1, und)]
  check_cache(reference, ctx, "kv_after_image1", np.r_[np.arange(start), start + np.array(image)])


@pytest.mark.parametrize("number", [1, 2])
def test_thoughts_are_identical(reference, checkpoint, number):
  job, ctx = context_before_image(reference, checkpoint, 1)
  ctx = irg.begin(job)
  if number == 2:
    ctx = irg.read_thoughts(job, ctx, thoughts_of(reference, 1), after_image=False)
    ctx = look_at_image1(reference, job, ctx)
  thoughts = irg.think(job, ctx, number - 1)
  assert thoughts[0].ids == thoughts_of(reference, number)[0].ids


VELOCITIES = [
    (1, "none", Guidance(text_scale=1.0)),
    (1, "global", Guidance(renorm="global")),
    (1, "channel", Guidance(renorm="channel")),
    (1, "text_channel", Guidance(renorm="text_channel")),
    (1, "global_min0.9", Guidance(renorm="global", renorm_min=0.9)),
    (2, "none", Guidance(text_scale=1.0)),
    (2, "global", Guidance(image_scale=2.0, renorm="global")),
    (2, "channel", Guidance(image_scale=2.0, renorm="channel")),
    (2, "text_channel", Guidance(image_scale=2.0, renorm="text_channel")),
]


def test_every_recorded_velocity_is_checked(reference):
  recorded = {n for r in (1, 2) for n in reference.names(f"irg/velocity{r}/")}
  assert recorded == {f"irg/velocity{r}/{name}" for r, name, _ in VELOCITIES}


@pytest.mark.parametrize("number,name,guidance", VELOCITIES)
def test_velocity_under_every_guidance(reference, checkpoint, number, name, guidance):
  recorded = reference.json("irg_settings.json")
  turn = _guidance(recorded[f"turn{number}"])
  scales = dict(text_scale=turn.text_scale, image_scale=turn.image_scale)
  if name == "none":
    scales["text_scale"] = 1.0
  guidance = Guidance(**scales, renorm=guidance.renorm, renorm_min=guidance.renorm_min)
  job, ctx = _context(reference, checkpoint, number)
  views = guidance_views(guidance)
  velocities = jax.jit(steps.velocities, static_argnames=("model", "grid", "special", "views"))
  v = velocities(
      job.model, job.params["transformer"], ctx, reference[f"irg/noise{number}"][None],
      np.float32(recorded[f"velocity{number}_t"]), grid=job.grid,
      special=checkpoint.special, views=views)
  got = v["full"] if len(views) == 1 else flow.guide(
      v, guidance.text_scale, guidance.image_scale, guidance.renorm, guidance.renorm_min)
  assert relative_error(got[0], reference[f"irg/velocity{number}/{name}"]) < 1e-5


@functools.cache
def _context(reference, checkpoint, number):
  return context_before_image(reference, checkpoint, number)


@pytest.mark.parametrize("number", [1, 2])
def test_latents_after_all_steps(reference, checkpoint, number):
  job, ctx = _context(reference, checkpoint, number)
  latents = irg.denoise(job, ctx, number - 1)
  assert relative_error(latents[0], reference[f"irg/latent{number}"]) < 1e-4


@pytest.mark.parametrize("number", [1, 2])
def test_images_from_recorded_latents(reference, checkpoint, number):
  job = job_of(reference, checkpoint)
  image = steps.decode_pixels(checkpoint.config, checkpoint.params["vae"],
                                reference[f"irg/latent{number}"][None], job.grid)
  check_image(image[0], reference[f"irg/image{number}"], levels=1, exact=0.99)


def check_image(got, want, levels, exact):
  """All values within `levels` but for what `exact` leaves, and equal in a share of `exact`."""
  difference = np.abs(np.asarray(got).astype(int) - want)
  assert got.shape == want.shape
  if levels == 1:
    assert difference.max() <= 1 and (difference == 0).mean() >= exact
  else:
    assert (difference <= levels).mean() >= exact


def test_two_rounds_end_to_end(reference, checkpoint):
  trajectories = irg.generate(
      checkpoint.model, checkpoint.params, IdTokenizer(checkpoint.special),
      [reference["irg/prompt_ids"]], seeds=[0], settings=settings_of(reference, checkpoint),
      system_prompt=reference["irg/system_ids"], noise=recorded_noise(reference))
  for number, result in enumerate(trajectories[0].rounds, 1):
    assert result.thought.ids == thoughts_of(reference, number)[0].ids
    check_image(result.image, reference[f"irg/image{number}"], levels=2, exact=0.99)


def test_a_text_that_ends_by_itself(reference, checkpoint):
  ids = reference["stop/greedy_ids"].tolist()
  thought = answer.answer(
      checkpoint.model, checkpoint.params, IdTokenizer(checkpoint.special),
      [[reference["stop/prompt_ids"]]], seeds=[0],
      settings=Settings(think_limit=len(ids) + 30, temperature=0.0))[0]
  assert not thought.hit_limit
  assert list(thought.ids) == ids


def test_image_understanding(reference, checkpoint):
  ids = reference["chat/greedy_ids"].tolist()
  side = checkpoint.config.vit.grid_size * checkpoint.config.vit.patch_size
  patch, stride = checkpoint.config.vit.patch_size, checkpoint.config.pixel_stride
  thought = answer.answer(
      checkpoint.model, checkpoint.params, IdTokenizer(checkpoint.special),
      [[reference["chat/image"], reference["chat/question_ids"]]], seeds=[0],
      settings=Settings(think_limit=len(ids) + 1, temperature=0.0,
                        vae_transform=ImageTransform(64 * stride, stride, stride),
                        vit_transform=ImageTransform(side, 2 * patch, patch)))[0]
  assert list(thought.ids) == ids
