"""`irg rl` from settings to weights: prompts, rewards, kills, and what it refuses."""

import collections
import dataclasses
import json
import math

import bucket_server
import jax
import numpy as np
import pytest
import rl_runs
from bucket_server import bucket
from conftest import ROOT
from judge_server import JudgeServer

from irg_jax import commands, evaluate, leases, storage, weights
from irg_jax.generate import irg
from irg_jax.generate.settings import Settings
from irg_jax.mini import benchmark, scenes, world
from irg_jax.mini import rewards as mini_rewards
from irg_jax.rl import prompts, rewards, rollout, run, statistics
from irg_jax.rl.settings import RlSettings, load, seed_of

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return rl_runs.make(tmp_path_factory.mktemp("rl"))


def use_letters(patch, stops=False):
  """Thoughts of the tiny model read as they were sampled; with `stops` some end the rounds."""
  words = rl_runs.Content if stops else rl_runs.Letters
  load_tokenizer, read_defaults = run.load_tokenizer, run.read_defaults
  patch.setattr(run, "load_tokenizer", lambda *args: words(load_tokenizer(*args).special))
  if stops:
    patch.setattr(run, "read_defaults", lambda base: dataclasses.replace(
        read_defaults(base), satisfied=rl_runs.SATISFIED))


@pytest.fixture
def letters(monkeypatch):
  use_letters(monkeypatch)


def learn(folder, out, *overrides, reward="bright"):
  return run.run_rl(rl_runs.settings(folder, *overrides, reward=reward), out)


# --- a run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
  """The folder of a run that nothing stopped."""
  out = tmp_path_factory.mktemp("runs") / "whole"
  with pytest.MonkeyPatch.context() as patch:
    use_letters(patch)
    assert learn(folder, out) == 0
  return out


def check_killed(folder, whole, out, when, stops=False):
  """A run in `out` that is killed in its second iteration ends as `whole`."""
  calls, overrides = collections.Counter(), rl_runs.STOPS if stops else ()

  def killed(patch, name, target, last):
    function = getattr(target, name)

    def stopping(*args):
      calls[name] += 1
      if calls[name] == last:
        raise KeyboardInterrupt
      return function(*args)

    patch.setattr(target, name, stopping)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    use_letters(patch, stops)
    killed(patch, *(("_sample_batch", rollout, 4) if when.startswith("among") else
                    ("update", run.Learner, 2)))
    learn(folder, out, *overrides)
  sampled, sample = [], rollout._sample_batch
  with pytest.MonkeyPatch.context() as patch:
    use_letters(patch, stops)
    patch.setattr(rollout, "_sample_batch", lambda *args: sampled.append(1) or sample(*args))
    assert learn(folder, out, *overrides) == 0
  assert len(sampled) == (1 if when.startswith("among") else 0)
  assert rl_runs.lines(out) == rl_runs.lines(whole)
  for name in ("ema.safetensors", "ae.safetensors"):
    assert ((out / "rl" / "weights" / name).read_bytes()
            == (whole / "rl" / "weights" / name).read_bytes())


@pytest.mark.parametrize("when", [
    "among the trajectories", pytest.param("before an update", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_bit_for_bit(folder, whole, tmp_path, when):
  check_killed(folder, whole, tmp_path, when)


@pytest.mark.long
@bucket_server.needed
def test_a_run_in_a_bucket_that_was_killed_ends_in_the_bytes_of_one_on_disk(folder, whole, bucket):
  check_killed(folder, whole, storage.path("gs://bucket/rl"), "among the trajectories")
  assert bucket.names("rl/rollouts/000002/00004/00005/trace.json")
  assert not [n for n in bucket.names("rl") if leases.UNFINISHED in n or ".lock" in n]
  assert not list(storage.cache_folder("logs").glob("*"))


@pytest.mark.long
def test_a_killed_run_in_which_rows_stop_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
  with pytest.MonkeyPatch.context() as patch:
    use_letters(patch, stops=True)
    assert learn(folder, tmp_path / "whole", *rl_runs.STOPS) == 0
  found = rl_runs.lines(tmp_path / "whole")
  for line in found.values():
    assert 0 < line["stopped/round2"] < 1 and "stopped/round3" in line
    assert line["ratio_off/text"] == line["ratio_off/image"] == 0
    assert line["thoughts/read_otherwise"] == 0
  assert any("stopped_right/round2" in line for line in found.values())
  check_killed(folder, tmp_path / "whole", tmp_path / "killed", "before an update", stops=True)
  check_killed(folder, tmp_path / "whole", tmp_path / "again", "among the trajectories", stops=True)
  use_letters(monkeypatch, stops=True)
  monkeypatch.setattr(rl_runs, "SATISFIED", "!")
  with pytest.raises(ValueError, match="started with satisfied=., not !"):
    run.prepare(rl_runs.settings(folder, *rl_runs.STOPS), tmp_path / "whole")


def test_a_run_from_before_there_was_a_learned_stop_goes_on(folder, whole, monkeypatch):
  now, read = rl_runs.settings(folder), run.runs.read

  def older(*args):
    record = read(*args)
    assert record["settings"]["rollout"].pop("until_satisfied") is None
    return record

  monkeypatch.setattr(run.runs, "read", older)
  run.check_folder(whole, run.with_model(now, folder / "checkpoint"))
  with pytest.raises(ValueError, match="rollout.until_satisfied=None, not True"):
    run.check_folder(whole, run.with_model(rl_runs.settings(
        folder, "rollout.until_satisfied=true"), folder / "checkpoint"))


def test_a_run_writes_figures_traces_and_weights_that_generate(folder, whole):
  found = rl_runs.lines(whole)
  assert set(found) == {1, 2}
  for line in found.values():
    assert {"reward/round1", "reward/round2", "reward/round1/even", "entropy", "clipped/text",
            "clipped/image", "thoughts/tokens", "loss/text", "loss/image"} <= set(line)
    assert line["ratio_off/text"] == line["ratio_off/image"] == 0
    assert line["thoughts/read_otherwise"] == 0
  first = whole / "rollouts" / "000001" / "00000" / "00000"
  assert json.loads((first / "trace.json").read_text())["prompt"].startswith("a thing")
  assert {"round1.png", "round2.png", "trace.html"} <= {p.name for p in first.iterdir()}
  config, params = weights.load_checkpoint(whole / "rl" / "weights")
  _, before = weights.load_checkpoint(folder / "checkpoint")
  moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), params, before)
  assert any(jax.tree.leaves(moved["transformer"])) and not any(jax.tree.leaves(moved["vae"]))


def test_a_run_learns_what_is_rewarded(folder, letters, tmp_path):
  assert learn(folder, tmp_path, "iterations=12", "learning_rate=1e-2", "image.weight=0",
               "group=12", "rollout.batch_size=24", "rollout.rounds=1", "rollout.think_limit=17",
               "checkpoint_every=20", reward="low") == 0
  reward = [line["reward/round1"] for _, line in sorted(rl_runs.lines(tmp_path).items())]
  assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.15, reward


@pytest.mark.long
def test_adapters_are_trained_and_written_with_several_updates(folder, letters, tmp_path):
  assert learn(folder, tmp_path, "lora.rank=2", "updates=2", "iterations=1",
               "text.divergence=0.1", "image.divergence=0.1",
               f"image.reward={folder / 'rewards.py'}:low") == 0
  line = rl_runs.lines(tmp_path)[1]
  for reward in ("bright", "low"):  # the images' own
    assert 0 < line[f"reward/{folder / 'rewards.py'}:{reward}/round1"] < 1
  assert 0 < line["ratio_off/text"] < 0.2  # of the second update
  assert line["divergence/text"] >= 0
  assert (tmp_path / "rl" / "adapters" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_more_iterations_go_on_and_export_anew(folder, letters, tmp_path):
  short = "rollout.rounds=1", "image.weight=0", "checkpoint_every=9"
  assert learn(folder, tmp_path, *short, "iterations=1") == 0
  before = (tmp_path / "rl" / "weights" / "ema.safetensors").read_bytes()
  assert learn(folder, tmp_path, *short, "iterations=2") == 0
  assert set(rl_runs.lines(tmp_path)) == {1, 2}
  assert (tmp_path / "rl" / "weights" / "ema.safetensors").read_bytes() != before


def test_other_settings_are_refused_and_more_iterations_are_not(folder, whole):
  with pytest.raises(ValueError, match="group=3, not 4"):
    run.prepare(rl_runs.settings(folder, "group=4"), whole)
  run.prepare(rl_runs.settings(folder, "iterations=9", "checkpoint_every=3"), whole)


def test_another_prompt_file_of_the_same_name_is_refused(folder, whole, monkeypatch):
  monkeypatch.setattr(prompts.Prompts, "_read", lambda self: rl_runs.PROMPTS[1:])
  with pytest.raises(ValueError, match="the run was started with prompts="):
    run.prepare(rl_runs.settings(folder), whole)


@pytest.mark.parametrize("overrides, message", [
    (["prompts="], "'prompts' is empty"), (["reward="], "'reward' is empty"),
    (["text.weight=0", "image.weight=0"], "nothing to learn"),
    (["updates=4"], "'updates' is 4, but must divide the 2 prompts"),
    (["accumulate=4"], "'accumulate' is 4, but must divide the 6 trajectories"),
    (["rollout.temperature=0"], "greedy thoughts are all alike"),
    (["image.window=5"], "more than image.among 4"),
    (["freeze=('und','ears')"], "not one of"),
    (["mesh.slice=2"], "within one slice"), (["lora.rank=2", "lora.targets=('ear',)"], "'ear'")])
def test_settings_that_cannot_be_are_named(folder, overrides, message):
  with pytest.raises(ValueError, match=message):
    rl_runs.settings(folder, *overrides)


@pytest.mark.parametrize("overrides, message", [
    (["reward=verifyer"], "'verifyer' is no reward .did you mean verifier"),
    (["checkpoint=nowhere"], "no such folder"), (["rollout.steps=3"], "'image.among' is 4"),
    (["rollout.height=40"], "height 40 is not a positive multiple"),
    (["prompts=nowhere.jsonl"], "neither a file nor a world")])
def test_what_cannot_work_is_told_before_weights_are_read(folder, tmp_path, monkeypatch, overrides,
                                                          message):
  monkeypatch.setattr(weights, "load_checkpoint", lambda *args, **options: 1 / 0)
  with pytest.raises(ValueError, match=message):
    learn(folder, tmp_path, *overrides)
  assert not (tmp_path / "run.json").exists()


def test_rounds_that_a_round_cannot_see_are_refused():
  settings = Settings(rounds=3, window=1)
  with pytest.raises(ValueError, match="set rounds to 2"):
    RlSettings(prompts="-", reward="-").check_generation(settings)
  with pytest.raises(ValueError, match="no thoughts to train"):
    RlSettings(prompts="-", reward="-").check_generation(Settings(rounds=1, think=False))


@pytest.mark.parametrize("preset", ["large", "mini"])
def test_presets_are_settings(preset):
  load(f"{ROOT / 'configs' / 'rl.py'}:{preset}", ["prompts=-", "reward=-"])


def test_the_command_names_the_field_that_is_wrong(tmp_path, capsys):
  config = f"{ROOT / 'configs' / 'rl.py'}:mini"
  assert commands.main(["rl", "--config", config, "--out", str(tmp_path), "--reward", "fame"]) == 2
  assert "config field 'reward': 'fame' is no reward" in capsys.readouterr().err
  assert commands.main(["rl", "--config", config, "--config.group=1"]) == 2
  assert "'group' is 1, but must be at least 2" in capsys.readouterr().err


def test_no_two_trajectories_of_a_run_share_a_seed():
  seeds = {seed_of(3, iteration, row, 64) for iteration in range(50) for row in range(64)}
  assert len(seeds) == 50 * 64 and max(seeds) < 2**32


# --- prompts


def of_file(tmp_path, records, **fields):
  path = tmp_path / "prompts.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return prompts.Prompts(dataclasses.replace(
      RlSettings(), prompts=str(path), **{"batch": 4} | fields))


def test_each_epoch_of_a_file_has_every_prompt_once(tmp_path):
  source = of_file(tmp_path, [{"prompt": f"p{i}"} for i in range(12)])
  epochs = [[r["prompt"] for i in range(3 * e, 3 * e + 3) for r in source(i)] for e in range(3)]
  assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 12 for epoch in epochs)
  assert epochs[0] != epochs[1]
  assert [r["prompt"] for r in source(1)] == epochs[0][4:8]  # again the same


def test_prompts_of_the_wanted_tasks_alone_are_taken(tmp_path):
  source = of_file(tmp_path, rl_runs.PROMPTS, tasks=("odd",))
  assert {r["tag"] for r in source(0)} == {"odd"}
  with pytest.raises(ValueError, match="holds no prompt with a tag of prime"):
    of_file(tmp_path, rl_runs.PROMPTS, tasks=("prime",))


def test_a_prompt_of_a_packaged_test_is_refused_however_it_is_spelt(tmp_path):
  for name in ("geneval", "mini"):
    item = evaluate.BENCHMARKS[name].read()[3]
    asked = f"  {item.prompt.upper()}. "
    with pytest.raises(ValueError, match="line 2: its prompt is one of a test, of "):
      of_file(tmp_path, [{"prompt": "a thing"}, {"prompt": asked}])


def test_a_prompt_of_a_given_test_is_refused(tmp_path):
  tests = tmp_path / "tests.txt"
  tests.write_text('a purple dog\n{"prompt": "a green cat"}\n')
  for prompt in ("a purple dog", "A green  cat."):
    with pytest.raises(ValueError, match="line 1: its prompt is one of a test, in .*tests.txt"):
      of_file(tmp_path, [{"prompt": prompt}], tests=(str(tests),))


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"prompt": " "}', '{"prompt": 3}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
  path = tmp_path / "prompts.jsonl"
  path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
  with pytest.raises(ValueError, match="prompts.jsonl, line 3: must be a JSON object"):
    prompts.Prompts(dataclasses.replace(RlSettings(), prompts=str(path)))


def test_the_mini_world_asks_for_nothing_that_its_test_asks_for():
  source = prompts.Prompts(dataclasses.replace(RlSettings(), prompts="mini", batch=50))
  held_out = {prompts.plain(item.prompt) for item in benchmark.MINI.read()}
  for iteration in range(20):
    for record in source(iteration):
      assert prompts.plain(record["prompt"]) not in held_out
      assert not world.is_for_test(record) and not world.is_unseen(record)


# --- rewards


def trajectory(*images):
  return irg.Trajectory("", [irg.Round(irg.Thought(f"thought {i}"), None, image, {})
                             for i, image in enumerate(images)])


GREY, WHITE = (np.full((64, 64, 3), level, np.uint8) for level in (170, 255))


def test_a_round_is_rewarded_for_its_own_image_and_mixtures_have_weights():
  functions = {"level": lambda record, t: t.rounds[-1].image.mean() / 255,
               "words": lambda record, t: len(t.rounds)}
  found = rewards.of_trajectories(
      functions, [{}, {}], [trajectory(GREY, WHITE), trajectory(WHITE, GREY)])
  np.testing.assert_allclose(found["level"], [[2 / 3, 1], [1, 2 / 3]])
  found = {"verifier": found["level"], "judge": found["words"]}
  np.testing.assert_allclose(rewards.mixed(found, "verifier=2,judge=0.5"),
                             2 * found["verifier"] + [[0.5, 1.0]])


def test_a_missing_reward_makes_the_mixture_missing_there_alone():
  functions = {"verifier": lambda record, t: record["reward"], "judge": lambda record, t: True}
  found = rewards.of_trajectories(
      functions, [{"reward": math.nan}, {"reward": 2}], [trajectory(GREY)] * 2)
  np.testing.assert_array_equal(rewards.mixed(found, "verifier,judge"), [[np.nan], [3.0]])


@pytest.mark.parametrize("value", [None, "much", [1.0], math.inf])
def test_a_reward_that_is_no_number_is_named(value):
  with pytest.raises(ValueError, match="reward 'fame' gave .*, which is no finite number"):
    rewards.of_trajectories({"fame": lambda *_: value}, [{}], [trajectory(GREY)])


def test_names_and_weights_are_read():
  assert rewards.parse("verifier=1.0, judge=0.2") == {"verifier": 1.0, "judge": 0.2}
  assert rewards.parse("verifier,a/b.py:f=2") == {"verifier": 1.0, "a/b.py:f": 2.0}
  for text in ("verifier=much", "verifier=nan"):
    with pytest.raises(ValueError, match="has no number as its weight"):
      rewards.parse(text)


@pytest.mark.parametrize("text, message", [
    ("def f(:", "SyntaxError"), ("x = 1", "has no function 'f'"), ("1 / 0", "ZeroDivisionError")])
def test_a_users_file_that_cannot_be_used_is_named(tmp_path, text, message):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(ValueError, match=f"mine.py.*{message}"):
    rewards.user(f"{tmp_path / 'mine.py'}:f")
  with pytest.raises(ValueError, match="none.py: no such file"):
    rewards.user(f"{tmp_path / 'none.py'}:f")


def test_the_verifier_rewards_images_that_show_what_was_asked_for():
  rng = np.random.default_rng(0)
  record = world.training_record(rng)
  right, empty = scenes.paint(scenes.sample_scene(record, rng)), GREY
  assert mini_rewards.right(record, trajectory(empty, right)) == 1.0
  assert mini_rewards.right(record, trajectory(right, empty)) == 0.0
  assert mini_rewards.nearly(record, trajectory(right)) == 1.0
  assert 0 < mini_rewards.nearly(record, trajectory(empty)) <= 0.5


@pytest.mark.parametrize("form, answer, wanted", [
    ("grade", lambda body: "It is fine.\nScore: 7", 0.7),
    ("probability", lambda body: {"message": {"content": "Yes"}, "logprobs": {"content": [{
        "top_logprobs": [{"token": "Yes", "logprob": math.log(0.25)},
                         {"token": "No", "logprob": math.log(0.75)}]}]}}, 0.25)])
def test_a_judge_is_asked_about_each_image_once(tmp_path, form, answer, wanted):
  with JudgeServer(answer) as server:
    settings = load_judge(server.url, form)
    for _ in range(2):  # the second time from the cache
      with rewards.opened(settings, tmp_path) as functions:
        found = rewards.of_trajectories(functions, [{"prompt": "a fox"}] * 2,
                                        [trajectory(GREY), trajectory(WHITE)])
      np.testing.assert_allclose(found["judge"], [[wanted], [wanted]])
    assert len(server.bodies) == 2
    assert "a fox" in server.bodies[0]["messages"][-1]["content"][-1]["text"]


def test_a_judge_without_an_answer_gives_no_reward(tmp_path):
  with JudgeServer(lambda body: "I would rather not say.") as server:
    with rewards.opened(load_judge(server.url), tmp_path) as functions:
      found = rewards.of_trajectories(functions, [{"prompt": "a fox"}], [trajectory(GREY)])
  assert np.isnan(found["judge"]).all()


def test_a_judge_without_an_address_is_refused(tmp_path):
  with pytest.raises(ValueError, match="judge's address"), rewards.opened(load_judge(""), tmp_path):
    pass


def load_judge(url, form="grade"):
  options = dataclasses.replace(RlSettings().judge, url=url, model="m", form=form)
  return dataclasses.replace(RlSettings(), reward="judge", judge=options)


# --- figures


def test_figures_say_what_became_of_right_and_wrong_images():
  record = lambda tag: {"prompt": "p", "tag": tag}
  rollouts = [rollout.Rollout(record(tag), 0, trajectory(GREY, GREY), 0, None, ())
              for tag in ("a", "a", "b", "b")]
  reward = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [np.nan, 1.0]])
  settings = dataclasses.replace(RlSettings(), group=2, reward="verifier=1.0")
  found = statistics.of_rollouts(rollouts, {"verifier": reward}, settings)
  assert found["right_made_wrong"] == 0.5 and found["wrong_made_right"] == 1.0
  assert found["reward/round1/a"] == 1.0 and found["reward/round2/a"] == 0.5
  assert found["reward/round1"] == pytest.approx(2 / 3)
  assert found["rewards_missing"] == 1 / 8
  assert found["groups_alike"] == 0.75  # a's first round, b's both


def test_advantages_are_apart_for_groups_and_rounds():
  settings = dataclasses.replace(RlSettings(), group=2)
  got = run.advantages([[1.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 3.0]], settings)
  np.testing.assert_allclose(np.sign(got), [[1, 0], [-1, 0], [0, -1], [0, 1]])
