"""Learning from rewards: trajectories, their rows, ratios and updates, on a tiny random model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_runs

from irg_jax import flow, sharding
from irg_jax.generate import irg, steps
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.rl import batches, programs, rollout, run, sampler, step
from irg_jax.rl.settings import ImageTrack
from irg_jax.train.step import init_state, make_optimizer
from irg_jax.weights import lora

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return rl_runs.make(tmp_path_factory.mktemp("rl"))


def measured(folder, rows, s, params=None):
  """`Measured` of the policy, as the run computes it before an update."""
  loaded, _ = rl_runs.policy(folder)
  return measure_of(folder, s.lora.rank > 0)(params or loaded.params["transformer"], rows)


@functools.cache  # settings of updates do not matter to it
def measure_of(folder, adapters):
  s = run.with_model(rl_runs.settings(folder, f"lora.rank={2 * adapters}"), folder / "checkpoint")
  return step.make_measure(UnifiedTransformer(s.model), s, rl_runs.policy(folder)[0].mesh)


def updated(folder, rows, s, old=None, reference=None, fresh=False, state=None, base=()):
  """(state, metrics) after one update."""
  loaded, _ = rl_runs.policy(folder)
  optimizer = make_optimizer(s.optimizer, s.stage)
  if state is None:
    state = init_state(loaded.params["transformer"], optimizer)
  old = measured(folder, rows, s) if old is None else old
  program = step.make_update(UnifiedTransformer(s.model), optimizer, s, loaded.mesh, state, rows,
                             old, *base)
  return program(state, rows, old, old if reference is None else reference, fresh, *base)


# --- trajectories


def test_without_noise_an_image_is_that_of_plain_generation(folder):
  loaded, generation = rl_runs.policy(folder)
  walk = rollout.Walk(dataclasses.replace(ImageTrack(), noise=0.0, window=2), 1)
  prompts, seeds = ["a fox", "two owls"], [3, 4]
  plain, walked = (loaded.batch(prompts, seeds, generation, "", size=2, draw=draw)
                   for draw in (None, walk))
  for a, b in zip(plain, walked):
    for one, other in zip(a.rounds, b.rounds):
      np.testing.assert_allclose(one.latents, other.latents, atol=2e-6)
      assert one.thought == other.thought


def test_noise_changes_images_and_follows_from_the_seed_alone(folder):
  loaded, generation = rl_runs.policy(folder)
  draw = lambda prompts, seeds: [t.rounds[0].latents for t in loaded.batch(
      prompts, seeds, generation, "", size=2, draw=rollout.Walk(ImageTrack(window=2), 1))]
  plain = loaded.batch(["a fox", "a fox"], [3, 4], generation, "", size=2)[0].rounds[0].latents
  first, second = draw(["a fox", "a fox"], [3, 4])
  np.testing.assert_allclose(draw(["an owl", "a fox"], [9, 3])[1], first, atol=1e-5)
  assert np.abs(first - second).max() > 0.1
  assert np.abs(first - plain).max() > 0.1


def test_what_is_read_from_the_files_is_what_was_drawn(folder):
  found = rl_runs.sampled(folder)
  assert [r.record for r in found] == [r for r in rl_runs.PROMPTS[:2] for _ in range(3)]
  assert len({r.seed for r in found}) == len(found)
  for r in found:
    assert len(r.trajectory.rounds) == 2 and len(r.seen) == 1
    assert r.path.shape == (2, 3, 6, 64) and r.path.dtype == np.float32
  again = rollout.read(folder / "rollouts" / "00000" / "00001")
  np.testing.assert_array_equal(again.path, found[1].path)
  np.testing.assert_array_equal(again.trajectory.rounds[0].image,
                                found[1].trajectory.rounds[0].image)
  assert again.trajectory.rounds[1].thought == found[1].trajectory.rounds[1].thought


def test_complete_trajectories_are_not_sampled_again_and_others_are(folder, monkeypatch):
  rl_runs.sampled(folder)
  loaded, generation = rl_runs.policy(folder)
  again = lambda identity: rollout.sample(
      loaded, rl_runs.settings(folder), generation, rl_runs.PROMPTS[:2], 1, folder / "rollouts",
      identity)
  made = []
  monkeypatch.setattr(rollout, "_sample_batch", lambda *args: made.append(args) or [])
  again("same")
  assert not made
  with pytest.raises(OSError):  # nothing was made by the stand-in
    again("another")
  assert made
  rl_runs.sampled.cache_clear()


# --- rows


@pytest.mark.parametrize("number", [0, 1])
def test_the_training_path_finds_the_noise_that_was_sampled(folder, number):
  rows, s = rl_runs.rows(folder)
  now, first = measured(folder, rows, s), rl_runs.sampled(folder)[0]
  times, window = flow.schedule(6, 3.0), 2
  keys = steps.row_keys(np.array([first.seed], np.uint32), number, "noise")
  for i in range(window):
    at = first.start + i
    noise = jax.random.normal(jax.random.fold_in(keys[0], at + 1), first.path.shape[2:])
    std = sampler.moments(0.0, 0.0, times[at], times[at + 1], s.image.noise)[1]
    wanted = jnp.mean(sampler.log_density(noise * std, 0.0, std))
    assert float(now.steps[0, 0, number * window + i]) == pytest.approx(float(wanted), abs=2e-4)


def test_tokens_are_as_likely_as_they_were_when_they_were_sampled(folder):
  """The likeliest token at each place is the one that greedy generation writes."""
  loaded, generation = rl_runs.policy(folder)
  greedy = dataclasses.replace(generation, temperature=0.0, rounds=1)
  drawn, = loaded.batch(["a thing"], [0], greedy, loaded.defaults.system_prompt, size=1)
  thought = drawn.rounds[0].thought
  assert thought.ids and thought.as_sampled
  entry = rollout.Rollout({"prompt": "a thing"}, 0, irg.Trajectory("a thing", drawn.rounds), 0,
                          np.zeros((1, 0, 0, 0), np.float32), ())
  s = run.with_model(rl_runs.settings(folder, "image.weight=0"), folder / "checkpoint")
  found = []
  for last in (thought.ids[-1], (thought.ids[-1] + 1) % 256):
    ids = (*thought.ids[:-1], last)
    other = dataclasses.replace(entry, trajectory=irg.Trajectory("a thing", [
        dataclasses.replace(drawn.rounds[0], thought=dataclasses.replace(thought, ids=ids))]))
    rows = batches.make_rows([other], np.ones((1, 1)), np.ones((1, 1)), s, greedy, loaded.defaults,
                             loaded.tokenizer, s.model)
    found.append(measured(folder, batches.stack(rows, 1), s).text[0, 0, len(ids) - 1])
  assert found[0] > found[1]


def test_an_end_that_was_not_sampled_and_a_thought_that_reads_otherwise_do_not_count(folder):
  loaded, generation = rl_runs.policy(folder)
  s, first = rl_runs.settings(folder), rl_runs.sampled(folder)[0]
  thoughts = [irg.Thought("ab", (97, 98), hit_limit=True),
              irg.Thought("abc", (97, 98, 99), as_sampled=False)]
  rounds = [dataclasses.replace(entry, thought=thought)
            for entry, thought in zip(first.trajectory.rounds, thoughts)]
  other = dataclasses.replace(first, trajectory=irg.Trajectory("", rounds))
  row, = batches.make_rows([other], [[2.0, 3.0]], [[4.0, 5.0]], s, generation, loaded.defaults,
                           loaded.tokenizer, loaded.model.config)
  assert row.text_weight[:8].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
  assert row.text_advantage[:8].tolist() == [2, 2, 2, 3, 3, 3, 3, 0]
  assert row.step_advantage.tolist() == [4, 4, 5, 5]


def test_rows_are_never_longer_than_the_longest_that_is_planned_for(folder):
  loaded, generation = rl_runs.policy(folder)
  rows, s = rl_runs.rows(folder)
  made, words = rows.batch, len(loaded.tokenizer.encode(loaded.defaults.system_prompt))
  longest = programs.longest_row(s, generation, words, 20).batch
  assert made.text_ids.shape[-1] <= len(longest.text_ids)
  assert made.text_place.shape[-1] <= len(longest.text_place)
  assert made.latents.shape[2:] == longest.latents.shape
  assert made.vit_patches.shape[2:] == longest.vit_patches.shape


# --- updates


def test_ratios_of_a_first_update_are_one(folder):
  rows, s = rl_runs.rows(folder)
  _, found = updated(folder, rows, s)  # log-probabilities of a program of their own
  assert float(found["ratio_off/text"]) < 1e-5
  assert float(found["ratio_off/image"]) < 1e-5
  zeros = jax.tree.map(jnp.zeros_like, measured(folder, rows, s))
  _, found = updated(folder, rows, s, old=zeros, fresh=True)
  assert float(found["ratio_off/text"]) == float(found["ratio_off/image"]) == 0.0


def test_a_step_along_the_gradient_makes_better_trajectories_likelier(folder):
  rows, s = rl_runs.rows(folder, "learning_rate=1e-4")
  before = measured(folder, rows, s)
  state, _ = updated(folder, rows, s)
  after = measured(folder, rows, s, state.params)
  for name, weight, worth in (("text", rows.text_weight, rows.text_advantage),
                              ("steps", rows.step_weight, rows.step_advantage)):
    gain = (getattr(after, name) - getattr(before, name)) * weight * worth
    assert float(jnp.sum(gain)) > 0


@pytest.mark.long
def test_parts_of_an_update_give_what_the_whole_gives(folder):
  whole, parts = ({name: float(x) for name, x in updated(
      folder, *rl_runs.rows(folder, f"accumulate={n}"))[1].items()} for n in (1, 3))
  assert whole.keys() == parts.keys()
  for name in whole:
    assert parts[name] == pytest.approx(whole[name], rel=2e-4, abs=1e-6), name


def moved(before, after):
  """Parts of the tree that differ: "und", "gen", ..."""
  differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
  return {jax.tree_util.keystr(path, simple=True, separator="/")
          for path, x in jax.tree.leaves_with_path(differ) if x}


@pytest.mark.parametrize("off, on", [("text", "image"), ("image", "text")])
def test_either_track_learns_alone(folder, off, on):
  rows, s = rl_runs.rows(folder, f"{off}.weight=0")
  loaded, _ = rl_runs.policy(folder)
  state, found = updated(folder, rows, s)
  names = moved(loaded.params["transformer"], state.params)
  assert f"loss/{on}" in found and f"loss/{off}" not in found
  assert ("heads/text/kernel" in names) == (on == "text")
  assert ("heads/velocity/kernel" in names) == (on == "image")


def test_frozen_parts_do_not_move(folder):
  rows, s = rl_runs.rows(folder, "freeze=('und','llm')")
  loaded, _ = rl_runs.policy(folder)
  state, _ = updated(folder, rows, s)
  assert not {n for n in moved(loaded.params["transformer"], state.params)
              if n.startswith(("decoder", "embed", "heads/text"))}


@pytest.mark.long
@pytest.mark.parametrize("measure", ["step", "velocity"])
def test_divergence_is_none_from_itself_and_grows_with_the_distance(folder, measure):
  rows, s = rl_runs.rows(folder, "text.divergence=0.1", "image.divergence=0.1",
                         f"image.measure={measure}")
  loaded, _ = rl_runs.policy(folder)
  own = measured(folder, rows, s)
  shifted = jax.tree.map(lambda x: x * 1.02, loaded.params["transformer"])
  far = measured(folder, rows, s, shifted)
  none, some = (updated(folder, rows, s, reference=x)[1] for x in (own, far))
  for track in ("text", "image"):
    assert abs(float(none[f"divergence/{track}"])) < 1e-6
    assert float(some[f"divergence/{track}"]) > 1e-6
  difference = jnp.mean((own.velocity - far.velocity)**2, -1)
  time, after = rows.time[0], rows.next_time[0]
  scale = sampler.divergence_scale(time, after, s.image.noise) if measure == "step" else 1.0
  wanted = jnp.mean((difference * scale)[0][np.asarray(rows.step[0] >= 0)])
  assert float(some["divergence/image"]) == pytest.approx(float(wanted), rel=1e-3)


def test_adapters_learn_beside_weights_that_stay(folder):
  rows, s = rl_runs.rows(folder, "lora.rank=2", "text.divergence=0.1")
  loaded, _ = rl_runs.policy(folder)
  base = loaded.params["transformer"]
  adapters = lora.new_adapters(s.model, s.lora, 0)
  state = init_state(adapters, make_optimizer(s.optimizer, s.stage))
  measure = measure_of(folder, True)
  old, reference = measure(adapters, rows, base), measure(base, rows)
  np.testing.assert_allclose(old.text, reference.text, atol=1e-5)  # they change nothing yet
  state, found = updated(folder, rows, s, old=old, reference=reference, state=state, base=(base,))
  assert float(found["ratio_off/text"]) < 1e-5
  assert abs(float(found["divergence/text"])) < 1e-6
  after = measure(state.params, rows, base)
  assert float(jnp.max(jnp.abs(after.text - reference.text))) > 1e-6
