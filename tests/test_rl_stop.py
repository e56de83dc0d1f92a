"""Learning from rewards with a learned stop: trajectories, their rows, rewards and figures."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_runs
from test_rl import measured, updated

from irg_jax import flow, weights
from irg_jax.generate import irg, steps, stopping
from irg_jax.generate.settings import Settings
from irg_jax.rl import batches, rewards, rollout, run, sampler, statistics, step

pytestmark = pytest.mark.usefixtures("on_one_device")
ROUNDS, WINDOW = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return rl_runs.make(tmp_path_factory.mktemp("rl"))


@functools.cache
def sampled(folder, stops=True, words=rl_runs.Content):
  """The trajectories of iteration 1, all rounds of them without `stops`."""
  loaded, generation = rl_runs.stopping_policy(folder, words)
  generation = dataclasses.replace(generation, until_satisfied=stops)
  return rollout.sample(loaded, rl_runs.settings(folder, *rl_runs.STOPS), generation,
                        rl_runs.PROMPTS[:2], 1, folder / f"{words.__name__}{stops}", "same")


def own(found):
  return stopping.own(found.trajectory.rounds)


def drawn(found):
  return sum(not entry.kept for entry in found.trajectory.rounds)


@functools.cache
def pair(folder):
  """(a trajectory that stopped in round 2, one that did not stop)."""
  found = sampled(folder)
  return (next(r for r in found if drawn(r) == 1), next(r for r in found if drawn(r) == ROUNDS))


WORTH = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def rows_of(folder, found, worth=WORTH):
  """(Rows with axes [1, B], settings)."""
  loaded, generation = rl_runs.stopping_policy(folder)
  s = run.with_model(rl_runs.settings(folder, *rl_runs.STOPS), folder / "checkpoint")
  made = batches.make_rows(found, worth, 10 * worth, s, generation, loaded.defaults,
                           loaded.tokenizer, loaded.model.config)
  return batches.stack(made, 1), s


# --- trajectories


def test_a_trajectory_that_stopped_repeats_its_image_without_a_thought(folder):
  assert {1, ROUNDS} <= set(map(drawn, sampled(folder)))
  for got, full in zip(sampled(folder), sampled(folder, stops=False)):
    rounds, count = got.trajectory.rounds, drawn(got)
    assert len(rounds) == ROUNDS and len(got.seen) == ROUNDS - 1
    assert [r.kept for r in rounds] == [number >= count for number in range(ROUNDS)]
    np.testing.assert_allclose(got.path[:count], full.path[:count], atol=1e-5)
    assert not got.path[count:].any() and got.path.shape == full.path.shape
    for number, entry in enumerate(rounds):
      if number <= count:
        assert entry.thought == full.trajectory.rounds[number].thought
        assert (rl_runs.SATISFIED in entry.thought.text and number > 0) == entry.kept
      else:
        assert entry.thought == irg.Thought()
      np.testing.assert_array_equal(entry.image, rounds[min(number, count - 1)].image)


def test_files_say_which_rounds_were_kept_and_are_as_before_without_a_stop(folder):
  for number, found in enumerate(sampled(folder)):
    place = folder / "ContentTrue" / f"{number // 4 * 4:05}" / f"{number:05}"
    told = json.loads((place / "rollout.json").read_text())
    assert ("kept" in told) == (drawn(found) < ROUNDS)
    trace = json.loads((place / "trace.json").read_text())
    assert len(trace["rounds"]) == len(own(found))
    assert trace["rounds"][-1].get("kept", False) == (drawn(found) < ROUNDS)
  rl_runs.sampled(folder)
  assert not any("kept" in path.read_text()
                 for path in (folder / "rollouts").rglob("rollout.json"))


def test_rounds_that_no_row_drew_have_no_steps(folder):
  for found in sampled(folder, words=rl_runs.Pleased):
    assert drawn(found) == 1 and len(found.trajectory.rounds) == ROUNDS
    assert found.path.shape[0] == ROUNDS
    assert found.path[0].any() and not found.path[1:].any()


# --- rows


def test_rows_hold_what_was_sampled_and_nothing_else(folder):
  found = pair(folder)
  rows, _ = rows_of(folder, found)
  for row, one in enumerate(found):
    ids, weight, text, worth = [], [], [], []
    for entry, advantage in zip(own(one), WORTH[row]):
      ids += [*entry.thought.ids, rl_runs.policy(folder)[0].tokenizer.special.text_end]
      weight += [1.0] * len(entry.thought.ids) + [float(not entry.thought.hit_limit)]
      text += [advantage] * (len(entry.thought.ids) + 1)
      worth += [10 * advantage] * WINDOW
    count = len(ids)
    assert rows.batch.text_target[0, row, :count].tolist() == ids
    assert rows.text_weight[0, row, :count].tolist() == weight
    assert rows.text_advantage[0, row, :count].tolist() == text
    assert not rows.text_weight[0, row, count:].any()
    steps_drawn = drawn(one) * WINDOW
    own_steps = np.arange(ROUNDS * WINDOW) < steps_drawn
    assert rows.step_weight[0, row].tolist() == own_steps.astype(float).tolist()
    assert rows.step_advantage[0, row, :steps_drawn].tolist() == worth[:steps_drawn]
    numbers, counts = np.unique(rows.step[0, row], return_counts=True)
    assert numbers.tolist() == [-1, *range(steps_drawn)] and set(counts[1:]) == {6}
    at = rows.step[0, row] == steps_drawn - 1
    np.testing.assert_array_equal(rows.batch.latents[0, row][at], one.path[drawn(one) - 1, -2])
    np.testing.assert_array_equal(rows.after[0, row][at], one.path[drawn(one) - 1, -1])
    seen = np.unique(rows.batch.vit_image[0, row])
    assert np.sum(seen >= 0) == len(own(one)) - 1


def test_sizes_of_rows_do_not_depend_on_who_stops(folder):
  shapes = lambda found: jax.tree.map(np.shape, rows_of(folder, found)[0])
  full = shapes(sampled(folder, stops=False)[:2])
  assert shapes(pair(folder)) == shapes([pair(folder)[0]] * 2) == full


def test_the_training_path_finds_the_noise_of_each_round_that_was_drawn(folder):
  found, (rows, s) = pair(folder), rows_of(folder, pair(folder))
  now, times = measured(folder, rows, s), flow.schedule(6, 3.0)
  for row, one in enumerate(found):
    for number in range(drawn(one)):
      key, = steps.row_keys(np.array([one.seed], np.uint32), number, "noise")
      for i in range(WINDOW):
        at = one.start + i
        noise = jax.random.normal(jax.random.fold_in(key, at + 1), one.path.shape[2:])
        std = sampler.moments(0.0, 0.0, times[at], times[at + 1], s.image.noise)[1]
        wanted = jnp.mean(sampler.log_density(noise * std, 0.0, std))
        assert float(now.steps[0, row, number * WINDOW + i]) == pytest.approx(float(wanted),
                                                                              abs=2e-4)
    assert not now.steps[0, row, drawn(one) * WINDOW:].any()


def test_a_thought_that_stops_is_as_likely_as_where_it_stops_nothing(folder):
  number = sampled(folder).index(pair(folder)[0])
  full = sampled(folder, stops=False)[number]
  found = []
  for one in (pair(folder)[0], full):
    rows, s = rows_of(folder, [one, pair(folder)[1]])
    found.append(measured(folder, rows, s).text[0, 0])
  count = sum(len(entry.thought.ids) + 1 for entry in own(pair(folder)[0]))
  np.testing.assert_allclose(found[0][:count], found[1][:count], atol=1e-5)
  assert (found[0][:count] < -0.1).any()


# --- updates


def test_a_stop_that_did_better_becomes_likelier_and_ratios_are_one_before(folder):
  worth = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
  rows, s = rows_of(folder, pair(folder), worth)
  before = measured(folder, rows, s)
  zeros = jax.tree.map(jnp.zeros_like, before)
  state, found = updated(folder, rows, s, old=zeros, fresh=True)
  assert float(found["ratio_off/text"]) == float(found["ratio_off/image"]) == 0.0
  after = measured(folder, rows, s, state.params)
  stop = rows.text_weight * rows.text_advantage  # of the thought that stopped alone
  assert np.sum(stop) >= len(own(pair(folder)[0])[-1].thought.ids)
  assert float(jnp.sum((after.text - before.text) * stop)) > 0


def test_no_gradient_comes_from_rounds_that_were_not_drawn(folder):
  rows, s = rows_of(folder, pair(folder), np.full((2, ROUNDS), 1e6))
  now = jax.tree.map(lambda x: x[0], measured(folder, rows, s))
  part = jax.tree.map(lambda x: jnp.asarray(x[0]), rows)
  totals = {"text": part.text_weight.sum(), "image": part.step_weight.sum()}
  loss = lambda x: step.losses(dataclasses.replace(now, steps=x), jnp.zeros_like(now.text), now,
                               now, part, totals, s)[0]
  gradient = np.asarray(jax.grad(loss)(now.steps))
  count = WINDOW * drawn(pair(folder)[0])
  assert gradient[0, :count].all() and not gradient[0, count:].any() and gradient[1].all()


# --- rewards and figures


def made(*kept, text="more"):
  """A trajectory in which the rounds from `kept` on keep their image; its levels are rewards."""
  levels, rounds = kept[:-1], []
  for number, level in enumerate(levels):
    last = number >= kept[-1]
    thought = irg.Thought("", ()) if number > kept[-1] else irg.Thought(text, (1,) * (number + 1))
    rounds.append(irg.Round(thought, None, np.full((2, 2, 3), level, np.uint8), {}, kept=last))
  return types.SimpleNamespace(trajectory=irg.Trajectory("a", rounds), record={"prompt": "a"})


def test_rounds_after_a_stop_have_its_reward_and_are_not_judged_again():
  asked = []
  functions = {"asked": lambda record, t: asked.append(len(t.rounds)) or 0,
               "level": lambda record, t: float(t.rounds[-1].image.mean()),
               "words": lambda record, t: len(t.rounds[-1].thought.ids),
               "rounds": lambda record, t: len(t.rounds)}
  rollouts = [made(7, 7, 7, 1), made(3, 4, 5, 9)]
  found = rewards.of_trajectories(functions, [{}, {}], [r.trajectory for r in rollouts])
  np.testing.assert_array_equal(found["level"], [[7, 7, 7], [3, 4, 5]])
  np.testing.assert_array_equal(found["words"], [[1, 2, 2], [1, 2, 3]])
  np.testing.assert_array_equal(found["rounds"], [[1, 2, 2], [1, 2, 3]])
  assert asked == [1, 1, 2, 2, 3]


def test_figures_say_who_stopped_and_who_was_right(folder):
  s = rl_runs.settings(folder, "group=2")
  rollouts = [made(1, 1, 1, 1), made(0, 0, 0, 1), made(0, 1, 1, 2), made(0, 0, 1, 9)]
  reward = np.array([[r.image.mean() for r in x.trajectory.rounds] for x in rollouts])
  mixture = {next(iter(rewards.parse(s.reward))): reward}
  found = statistics.of_rollouts(rollouts, mixture, s, True)
  assert found["stopped/round2"] == 0.5 and found["stopped_right/round2"] == 0.5
  assert found["stopped/round3"] == 0.25 and found["stopped_right/round3"] == 1.0
  assert found["thoughts/tokens"] == np.mean([1, 2, 1, 2, 1, 2, 3, 1, 2, 3])
  plain = statistics.of_rollouts(rollouts, mixture, s)
  assert plain == {name: x for name, x in found.items() if not name.startswith("stopped")}
  missing = {name: np.where(x == 1, np.nan, x) for name, x in mixture.items()}
  assert statistics.of_rollouts(rollouts, missing, s, True)["stopped_right/round2"] == 0.0
  values, told = statistics.samples(rollouts, reward)
  assert set(values) == {"samples/round1", "samples/round2", "samples/thoughts"}
  assert "round 3" not in values["samples/thoughts"] and told.endswith("1.000, 1.000")


# --- settings


def test_it_is_a_setting_of_its_own_and_else_that_of_generation(folder):
  for text, wanted in ((), (False, True)), (("true",), (True, True)), (("false",), (False, False)):
    overrides = [f"rollout.until_satisfied={x}" for x in text]
    s = rl_runs.settings(folder, *overrides).rollout
    assert tuple(s.settings(Settings(until_satisfied=base)).until_satisfied
                 for base in (False, True)) == wanted


def test_a_checkpoint_that_does_not_say_it_is_refused_before_anything_is_sampled(
    folder, tmp_path, monkeypatch):
  monkeypatch.setattr(weights, "load_checkpoint", lambda *args, **options: 1 / 0)
  with pytest.raises(ValueError, match="generate.json has no 'satisfied'.*set the field to false"):
    run.run_rl(rl_runs.settings(folder, *rl_runs.STOPS), tmp_path)
  assert not (tmp_path / "run.json").exists()
