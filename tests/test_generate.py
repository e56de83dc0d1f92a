"""Interleaved generation on a tiny random model: batches, meshes, edge cases, compilations."""

import dataclasses
import functools
import math
import pathlib

import jax
import numpy as np
import pytest

from irg_jax import config as config_lib
from irg_jax import sharding
from irg_jax.config import SpecialTokens
from irg_jax.data.batch import LENGTH_FEATURES, BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.generate import answer, context, irg, steps
from irg_jax.generate.settings import Guidance, Settings
from irg_jax.images import ImageTransform
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.weights.init import random_params

CONFIG = config_lib.read_model(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")
MODEL = UnifiedTransformer(CONFIG)
SPECIAL = SpecialTokens(text_start=256, text_end=257, image_start=258, image_end=259)
SETTINGS = Settings(
    rounds=2, height=32, width=48, steps=4, think_limit=12, max_prompt_tokens=60, temperature=1.0,
    vae_transform=ImageTransform(128, 32, 16), vit_transform=ImageTransform(112, 28, 14))
ONE_ROUND = dataclasses.replace(SETTINGS, rounds=1)
SYSTEM = (1, 2, 3)
PROMPTS = [(5, 6, 7), tuple(range(20, 60)), (9,), (70, 71, 72, 73, 74)]
SEEDS = [3, 1, 4, 15]


class IdTokenizer:
  """Texts are tuples of ids."""

  def __init__(self, special=SPECIAL):
    self.special = special

  def encode(self, text):
    return [int(i) for i in text]

  def decode(self, ids):
    return tuple(int(i) for i in ids)


@functools.cache
def params():
  return random_params(CONFIG, jax.random.key(0))


def generate(prompts=PROMPTS, seeds=SEEDS, settings=SETTINGS, system=SYSTEM, special=SPECIAL,
             weights=None, model=MODEL, **kwargs):
  return irg.generate(model, weights or params(), IdTokenizer(special), prompts, seeds=seeds,
                      settings=settings, system_prompt=system, **kwargs)


@functools.cache
def batch_of_four():
  return generate()


def assert_same(got, want):
  """Asserts equal thoughts, latents within 1e-4, and images within a level here and there.

  Images are truncated to 8 bits, so rounding may move a value at a level's edge by a whole
  level; a round that has read such an image really has seen another one.
  """
  assert len(got.rounds) == len(want.rounds)
  tolerance = 1e-4
  for a, b in zip(got.rounds, want.rounds):
    assert a.thought == b.thought
    assert np.linalg.norm(a.latents - b.latents) < tolerance * np.linalg.norm(b.latents)
    differs = np.abs(a.image.astype(int) - b.image)
    assert differs.max() <= 1 and differs.mean() < 0.02
    tolerance = 1e-4 if not differs.any() else 1e-3


@pytest.mark.parametrize("row", range(4))
def test_a_row_of_a_batch_is_what_it_is_alone(row):
  alone, = generate([PROMPTS[row]], [SEEDS[row]])
  assert_same(batch_of_four()[row], alone)


def test_a_run_that_goes_on_makes_what_it_would_have_made():
  told = []
  whole = generate(on_result=lambda rounds: told.append(list(rounds)))
  for got, want in zip(whole, batch_of_four()):
    assert_same(got, want)
  drawn = lambda rounds: [[row.image is not None for row in rows] for rows in rounds]
  no, yes = [False] * 4, [True] * 4
  assert list(map(drawn, told)) == [[no], [yes], [yes, no]]
  for known in (1, 3):
    later = []
    again = generate(done=told[known - 1], on_result=lambda rounds: later.append(drawn(rounds)))
    assert later == list(map(drawn, told))[known:]
    for got, want in zip(again, whole):
      for a, b in zip(got.rounds, want.rounds):
        assert a.thought == b.thought
        np.testing.assert_array_equal(a.image, b.image)


def test_rows_differ():
  first, second = (t.rounds[0] for t in batch_of_four()[:2])
  assert first.thought != second.thought
  assert np.abs(first.latents - second.latents).max() > 0.1


def test_the_order_of_the_rows_does_not_matter():
  order = [2, 0, 3, 1]
  shuffled = generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order])
  for place, row in enumerate(order):
    assert_same(shuffled[place], batch_of_four()[row])


def test_eight_devices_give_what_one_gives_and_hold_their_part():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  weights = jax.device_put(params(), sharding.parameter_shardings(params(), mesh))
  up = weights["transformer"]["decoder"]["layers"]["und"]["up"]["kernel"]
  layers, width, mlp = up.shape
  assert up.addressable_shards[0].data.shape == (layers, width // 2, mlp // 2)
  with jax.set_mesh(mesh):
    for got, want in zip(generate(weights=weights), batch_of_four()):
      assert_same(got, want)
    job = irg.prepare(MODEL, weights, IdTokenizer(), PROMPTS, seeds=SEEDS, settings=SETTINGS,
                      system_prompt=SYSTEM)
    ctx = irg.begin(job)
    latents = irg.denoise(job, ctx, 0)
  layers, B, heads, slots, dim = ctx.k.shape
  assert ctx.k.addressable_shards[0].data.shape == (layers, B // 4, heads // 2, slots, dim)
  assert ctx.visible.addressable_shards[0].data.shape[0] == B // 4
  assert latents.addressable_shards[0].data.shape[0] == B // 4


@pytest.mark.long
@pytest.mark.parametrize("shape", [{}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_kernels_draw_what_the_other_forms_draw_on_every_mesh(shape):
  """`tensor` of 4 is more than the two heads of keys and values."""
  model = UnifiedTransformer(dataclasses.replace(CONFIG, attention="kernel"))
  mesh = sharding.make_mesh(shape or {"data": 1}, jax.devices()[:math.prod(shape.values())])
  with jax.set_mesh(mesh):
    weights = jax.device_put(params(), sharding.parameter_shardings(params(), mesh))
    for got, want in zip(generate(weights=weights, model=model), batch_of_four()):
      assert_same(got, want)


def test_an_empty_guidance_context_works_in_a_batch():
  settings = dataclasses.replace(ONE_ROUND, think=False)
  rows = generate(settings=settings, system=())
  for row in range(2):
    alone, = generate([PROMPTS[row]], [SEEDS[row]], settings, system=())
    assert_same(rows[row], alone)
    assert np.isfinite(rows[row].rounds[0].latents).all()
  unguided = dataclasses.replace(settings, first=Guidance(text_scale=1.0))
  plain, = generate(PROMPTS[:1], SEEDS[:1], unguided, system=())
  assert np.abs(plain.rounds[0].latents - rows[0].rounds[0].latents).max() > 1e-3


@functools.cache
def silent_params():
  """All logits are equal, so greedy decoding always writes token 0."""
  zeroed = jax.tree.map(lambda x: x, params())
  heads = zeroed["transformer"]["heads"]
  heads["text"]["kernel"] = 0 * heads["text"]["kernel"]
  return zeroed


def test_a_thought_that_ends_at_once_and_one_that_hits_the_limit():
  def thought(special):
    job = irg.prepare(MODEL, silent_params(), IdTokenizer(special), PROMPTS[:1], seeds=[0],
                      settings=dataclasses.replace(ONE_ROUND, temperature=0.0))
    return irg.think(job, irg.begin(job), 0)[0]

  at_once = dataclasses.replace(SPECIAL, text_end=0)
  assert thought(at_once) == irg.Thought(text=(), ids=(), hit_limit=False)
  assert thought(SPECIAL) == irg.Thought(text=(0,) * 11, ids=(0,) * 11, hit_limit=True)


def test_a_limit_of_one_leaves_no_room_for_text():
  thought = generate(PROMPTS[:1], [0], dataclasses.replace(ONE_ROUND, think_limit=1))[0].rounds[0].thought
  assert thought.ids == () and thought.hit_limit


def test_rows_end_their_thoughts_apart():
  # One hidden number decides: where it is high, the end token is likely; else all are alike.
  weights = jax.tree.map(lambda x: x, silent_params())
  transformer = weights["transformer"]
  kernel = transformer["heads"]["text"]["kernel"]
  transformer["heads"]["text"]["kernel"] = kernel.at[0, SPECIAL.text_end].set(4.0)
  rows = generate(settings=ONE_ROUND, weights=weights)
  counts = [len(t.rounds[0].thought.ids) for t in rows]
  assert len(set(counts)) > 1 and min(counts) < SETTINGS.think_limit - 1
  for row, prompt, seed in zip(rows, PROMPTS, SEEDS):
    assert_same(row, generate([prompt], [seed], ONE_ROUND, weights=weights)[0])


@pytest.mark.parametrize("rounds", [1, 3, pytest.param(4, marks=pytest.mark.long)])
def test_any_number_of_rounds_begins_alike(rounds):
  longer = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(SETTINGS, rounds=rounds))[0]
  assert len(longer.rounds) == rounds
  for got, want in zip(longer.rounds, batch_of_four()[0].rounds):
    assert got.thought == want.thought
    assert np.abs(got.latents - want.latents).max() < 1e-3


def test_a_window_forgets_old_rounds_and_a_small_cache_forces_one():
  three = dataclasses.replace(SETTINGS, rounds=3)
  everything = generate(PROMPTS[:1], SEEDS[:1], three)[0]
  windowed = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(three, window=1))[0]
  for round_number in (0, 1):
    assert windowed.rounds[round_number].thought == everything.rounds[round_number].thought
  assert np.abs(windowed.rounds[2].latents - everything.rounds[2].latents).max() > 1e-3

  job = irg.prepare(MODEL, params(), IdTokenizer(), PROMPTS[:1], seeds=SEEDS[:1],
                    settings=dataclasses.replace(three, window=1), system_prompt=SYSTEM)
  small, _ = job.cache
  squeezed = dataclasses.replace(three, cache_size=small)
  assert dataclasses.replace(job, settings=squeezed).cache == (small, 1)
  assert_same(generate(PROMPTS[:1], SEEDS[:1], squeezed)[0], windowed)


def test_a_cache_too_small_for_one_round_is_refused():
  with pytest.raises(ValueError, match="cache_size 100 is too small.*at least"):
    generate(settings=dataclasses.replace(SETTINGS, cache_size=100))


def test_editing_depends_on_image_and_instruction():
  images = [np.full((32, 48, 3), level, np.uint8) for level in (20, 200, 80, 140)]
  edited = generate(settings=ONE_ROUND, images=images)
  swapped = generate(settings=ONE_ROUND, images=images[::-1])
  alone, = generate(PROMPTS[:1], SEEDS[:1], ONE_ROUND, images=images[:1])
  assert_same(edited[0], alone)
  assert np.abs(edited[0].rounds[0].latents - swapped[0].rounds[0].latents).max() > 1e-3


def test_several_images_are_read_in_their_order_as_in_training():
  """The velocity after two input images is that of the packed training pass, no other order's."""
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, shape, np.uint8) for shape in ((32, 48, 3), (48, 32, 3))]
  clean = {}
  predict = jax.jit(functools.partial(steps.velocities, MODEL, grid=(2, 3), special=SPECIAL,
                                      views=(context.FULL,)))
  apply = jax.jit(MODEL.apply)

  def velocity(order):
    job = irg.prepare(MODEL, params(), IdTokenizer(), PROMPTS[:1], seeds=[0], settings=ONE_ROUND,
                      system_prompt=SYSTEM, images=[[images[i] for i in order]])
    for i, batch in enumerate(job.images):
      kind = "input" if i else "posterior"
      clean[order, order[i]] = irg.encode(job, batch, i, kind=kind)
    ctx = irg.begin(job)
    x_BPC = job.noise("noise", 0, (1, 6, CONFIG.latent_dim))
    return x_BPC, predict(params()["transformer"], ctx, x_BPC, np.float32(0.6))["full"]

  def packed(order, x_BPC):
    grid = lambda x, size: np.asarray(x[0]).reshape(*size, -1)
    shown = [clean[order, i] for i in order]
    splits = [TextSplit(list(SYSTEM)), *(ImageSplit(
        grid(e["latents_BPC"], e["latent_grid"]), grid(e["patches_BPC"], e["vit_grid"]),
        need_vae=True, need_vit=True) for e in shown), TextSplit(list(PROMPTS[0])),
              ImageSplit(grid(x_BPC, (2, 3)), None, need_loss=True)]
    sample = sample_features(splits, CONFIG, SPECIAL)
    sizes = BufferSizes(samples=1, **{buffer: len(sample[name]) for buffer, name in
                                      LENGTH_FEATURES.items() if buffer != "samples"})
    batch = stack_rows([pack_row([sample], sizes)])
    return apply({"params": params()["transformer"]}, batch, batch.latents,
                 0.6 * batch.latent_weight)[1][:, -6:]

  got = {}
  for order in ((0, 1), (1, 0)):
    x_BPC, got[order] = velocity(order)
    np.testing.assert_allclose(got[order], packed(order, x_BPC), atol=2e-5)
  assert np.abs(got[0, 1] - got[1, 0]).max() > 1e-3


def test_one_image_in_a_list_is_one_image_and_several_need_room_in_the_cache():
  image = np.full((48, 32, 3), 20, np.uint8)
  one, listed = (generate(PROMPTS[:1], SEEDS[:1], ONE_ROUND, images=[x])[0]
                 for x in (image, [image]))
  assert_same(one, listed)
  sizes = [context.plan_cache(CONFIG, ONE_ROUND, 3, [(48, 32)] * n)[0] for n in (1, 2, 3)]
  assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
  three, = generate(PROMPTS[:1], SEEDS[:1], SETTINGS, images=[[image, image, image + 9]])
  assert np.isfinite(three.rounds[1].latents).all()
  assert np.abs(three.rounds[0].latents - one.rounds[0].latents).max() > 1e-3


def test_answers_about_images_and_chat():
  tokenizer = IdTokenizer()
  ask = functools.partial(answer.answer, MODEL, params(), tokenizer, seeds=[0] * 4,
                          settings=dataclasses.replace(SETTINGS, temperature=0.0))
  rng = np.random.default_rng(0)
  image = rng.integers(0, 255, (4, 32, 48, 3), dtype=np.uint8)
  about = ask([[*row] for row in zip(image, PROMPTS)])
  assert len(about) == 4 and all(len(a.ids) == 11 or not a.hit_limit for a in about)
  assert [a.ids for a in about] != [a.ids for a in ask([[prompt] for prompt in PROMPTS])]


def test_a_conversation_is_read_in_its_order_and_rows_do_not_depend_on_each_other():
  image = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
  ask = lambda *rows: [x.ids for x in answer.answer(
      MODEL, params(), IdTokenizer(), list(rows), seeds=[3] * len(rows),
      settings=dataclasses.replace(SETTINGS, temperature=0.0))]
  first, second = ([PROMPTS[i], x, PROMPTS[i + 1]] for i, x in enumerate(image))
  assert ask(first, second) == [*ask(first), *ask(second)]
  assert ask(first) != ask([first[1], first[0], first[2]])


@pytest.mark.parametrize("rows, fault", [
    ([[]], "empty"),
    ([[PROMPTS[0]], [PROMPTS[0], PROMPTS[1]]], "differ in the places"),
    ([[np.zeros((16, 16, 3), np.uint8)], [np.zeros((32, 16, 3), np.uint8)]], "one size"),
    ([[[5] * 100]], "text 1 of the conversation has 100 tokens"),
])
def test_conversations_that_cannot_be_read_are_refused(rows, fault):
  with pytest.raises(ValueError, match=fault):
    answer.answer(MODEL, params(), IdTokenizer(), rows, seeds=[0] * len(rows), settings=SETTINGS)


def test_a_listener_hears_each_text_as_it_grows_and_then_as_it_is_returned():
  heard = []
  drawn = generate(PROMPTS[:2], SEEDS[:2], SETTINGS,
                   on_text=lambda number, texts: heard.append((number, *texts)))
  for number in range(SETTINGS.rounds):
    for row in range(2):
      texts = [x[1 + row] for x in heard if x[0] == number]
      assert all(list(b)[:len(a)] == list(a) for a, b in zip(texts, texts[1:]))
      assert list(texts[-1]) == list(drawn[row].rounds[number].thought.text)


def test_room_for_longer_thoughts_and_schedules_changes_no_result_and_compiles_nothing():
  room = irg.Room(thought=40, times=30)
  settings = dataclasses.replace(ONE_ROUND, first=Guidance(interval=(0.0, 1.0)))
  wanted = generate(PROMPTS[:1], SEEDS[:1], settings)[0]
  got = generate(PROMPTS[:1], SEEDS[:1], settings, room=room)[0]
  assert got.rounds[0].thought == wanted.rounds[0].thought
  np.testing.assert_allclose(got.rounds[0].latents, wanted.rounds[0].latents, atol=1e-5)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
  generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(
      settings, steps=settings.steps + 3, think_limit=settings.think_limit - 3, temperature=1.5,
      cache_size=context.plan_cache(CONFIG, settings, 3)[0]), room=room)
  assert not compiled


def test_later_prompts_of_any_length_compile_nothing():
  generate(PROMPTS[:1], [0])
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
  for length in (1, 2, 5, 17, 30, 60):
    generate([tuple(range(length))], [length])
  assert not compiled


def test_progress_reports_every_step_of_every_phase():
  events = []
  generate(PROMPTS[:1], [0], on_progress=lambda *e: events.append(e))
  jax.effects_barrier()
  for number in (0, 1):
    for kind, total in (("think", 11), ("draw", 3)):
      steps_seen = [e[2] for e in events if e[:2] == (kind, number)]
      assert sorted(steps_seen) == list(range(total + 1)), kind
  assert {e[0] for e in events} == {"prompt", "think", "draw", "decode", "encode"}


def test_a_listener_changes_neither_the_programs_nor_the_results(monkeypatch):
  monkeypatch.setattr(irg, "_REPORTS", 2)  # fewer than there are steps
  silent, = generate(PROMPTS[:1], SEEDS[:1])
  compiled, heard = [], ([], [])
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
  for events in heard:
    listened, = generate(PROMPTS[:1], SEEDS[:1],
                         on_progress=lambda *event, to=events: to.append(event))
    assert_same(listened, silent)
  assert not compiled
  assert heard[0] == heard[1]
  assert [step for kind, number, step, total in heard[0] if (kind, number) == ("draw", 1)] == [
      0, 2, 3]


@pytest.mark.parametrize("change,message", [
    (dict(rounds=0), "'rounds' is 0"),
    (dict(height=40), "height 40 is not a positive multiple of 16"),
    (dict(width=4096), "width 4096 is more than the 128"),
    (dict(steps=1), "'steps' is 1"),
    (dict(think_limit=0), "'think_limit' is 0"),
    (dict(window=0), "'window' is 0"),
    (dict(think=False), "'rounds' is 2, but without thinking"),
    (dict(temperature=-1.0), "'temperature' is -1.0"),
    (dict(first=Guidance(renorm="none")), "'first.renorm' is 'none'"),
    (dict(first=Guidance(renorm_min=2.0)), "'first.renorm_min' is 2.0"),
    (dict(first=Guidance(interval=(0.4,))), "'first.interval' is"),
    (dict(first=Guidance(interval=(1.0, 0.4))), "'first.interval' is"),
    (dict(think_limit=20000), "'think_limit' is 20000, but must be at most"),
    (dict(vae_transform=ImageTransform(512, 256, 16)), "vae_transform reads images back at 384"),
    (dict(vit_transform=ImageTransform(140, 140, 14)), "vit_transform reads images back at"),
    (dict(vae_transform=ImageTransform(128, 32, 8)), "vae_transform.stride is 8"),
])
def test_settings_that_make_no_sense_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    generate(settings=dataclasses.replace(SETTINGS, **change))


@pytest.mark.parametrize("arguments,message", [
    (dict(prompts=[(1,) * 61], seeds=[0]), "prompt 0 has 61 tokens.*raise max_prompt_tokens"),
    (dict(seeds=[1]), "4 prompts but 1 seeds"),
    (dict(seeds=[1, 2, 3, -4]), "seeds must be from 0"),
    (dict(prompts=[(1,)], seeds=[0], images=[]), "1 prompts but 0 images"),
    (dict(prompts=[(1,)] * 2, seeds=[0, 1], images=[[np.zeros((32, 32, 3), np.uint8)] * n
                                                     for n in (1, 2)]), "give each prompt as many"),
    (dict(prompts=[(1,)], seeds=[0], images=[np.zeros((32, 32, 4), np.uint8)]), "must be uint8"),
])
def test_requests_that_cannot_work_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(**arguments)


def test_guidance_needs_only_the_views_it_uses():
  assert context.guidance_views(Guidance(text_scale=1.0, image_scale=2.0)) == (0,)
  assert context.guidance_views(Guidance(text_scale=2.0, image_scale=1.0)) == (0, 1)
  assert context.guidance_views(Guidance(text_scale=2.0, image_scale=2.0)) == (0, 1, 2)
