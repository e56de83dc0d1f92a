"""Controls of a run: seeds, arms without a mode, blind thoughts, and their figures."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from irg_jax import commands, runs, storage, weights
from irg_jax.data.records import MODES
from irg_jax.generate import generator, irg
from irg_jax.mini import arms, benchmark, controls, figures, phases, report, run
from irg_jax.train.settings import STAGES

ITEMS = benchmark.MINI.read()


@pytest.fixture
def finished(tmp_path, monkeypatch):
  """A run that counts as finished; whatever would train or draw is written down."""
  done = []
  for name in ("checkpoint", "irgl"):
    (tmp_path / name).mkdir()
  steps = {"stage1": {"steps": 100}, "stage2": {"steps": 800}}
  runs.write(tmp_path / "irgl" / "run.json", {"settings": steps})
  monkeypatch.setattr(run, "train_irgl", lambda settings, out, name, without: done.append(
      (name, without)))
  monkeypatch.setattr(run, "run", lambda settings, out: done.append((settings, out)))
  monkeypatch.setattr(report, "run", lambda out, arms: done.append(arms))
  return tmp_path, done


def test_controls_leave_out_each_mode_once_and_other_seeds_share_the_base_model(finished):
  out, done = finished
  settings = run.load("configs/mini.py:world2", ["seed=5", "autoencoder=irg_jax/mini/checkpoint"])
  assert controls.run_controls(settings, out, seeds=3) == 0
  *trained, second, third, drawn = done
  assert [without for _, without in trained] == list(MODES)
  for number, (again, folder) in enumerate((second, third), 1):
    assert folder == out / "seeds" / str(number) and again.seed == 5 + number
    assert again.base == str(out / "base" / "stage2" / "weights") and again.autoencoder == ""
    assert dataclasses.replace(again, seed=5, base="", autoencoder=settings.autoencoder) == settings
  assert drawn == arms.ALL


def test_controls_stop_where_a_training_is_asked_to_stop(finished, monkeypatch):
  out, done = finished
  monkeypatch.setattr(run, "train_irgl", lambda *_, **__: 3)
  assert controls.run_controls(run.load("configs/mini.py:world2"), out) == 3 and not done


def test_controls_need_a_finished_run_with_the_same_settings(finished, capsys):
  out, done = finished
  assert commands.main(["mini", "controls", "--out", str(out / "none")]) == 2
  assert "no finished run in there to control" in capsys.readouterr().err
  run.check_same(run.load("configs/mini.py", ["seed=1"]), out)
  assert commands.main(["mini", "controls", "--out", str(out)]) == 2
  assert "seed=1, not 0" in capsys.readouterr().err and not done


def test_controls_are_as_long_as_the_run_or_refused(finished, capsys):
  out, done = finished
  settings = run.load("configs/mini.py:world2", ["train=('stage2.steps=900',)"])
  with pytest.raises(ValueError, match="stage2 of this run has 800 updates.*world2 says 900"):
    controls.run_controls(settings, out)
  assert not done


def test_a_training_without_a_mode_has_no_rows_of_it_in_either_stage(monkeypatch, tmp_path):
  trained = []
  monkeypatch.setattr(run.train_run, "run_train", lambda s, out: trained.append((s, out)))
  settings = run.load("configs/mini.py:world2")
  run.train_irgl(settings, tmp_path)
  run.train_irgl(settings, tmp_path, name="less", without=MODES[5])
  (whole, _), (less, out) = trained
  assert out == tmp_path / "less"
  for stage in STAGES:
    before, after = (s.stages[stage].mixture for s in (whole, less))
    assert before[MODES[5]] > 0 and after == {m: w for m, w in before.items() if m != MODES[5]}
    assert less.stages[stage].steps == whole.stages[stage].steps


def test_a_run_from_a_base_model_trains_neither_it_nor_an_autoencoder(tmp_path, monkeypatch):
  monkeypatch.setattr(run, "_prepare", None)
  monkeypatch.setattr(run.vae, "train", None)
  settings = run.load("configs/mini.py", [f"base={storage.SHIPPED}"])
  run.make_start(settings, tmp_path)
  assert run.train_base(settings, tmp_path) == 0 == run.train_base(settings, tmp_path)
  given = weights.load_checkpoint(storage.SHIPPED)[1]
  for folder in (tmp_path / "start" / "weights", run.base_weights(tmp_path)):
    jax.tree.map(np.testing.assert_array_equal, given, weights.load_checkpoint(folder)[1])
  quick = run.load("configs/mini.py:quick", [f"base={storage.SHIPPED}"])
  with pytest.raises(ValueError, match="'base'.*sizes.*config.model.llm"):
    run.make_start(quick, tmp_path / "other")


@pytest.mark.long
def test_a_blind_thought_is_written_without_the_first_image_which_is_drawn_as_ever(
    on_one_device, monkeypatch):
  lengths, think = [], irg.think

  def spy(job, ctx, number, *args):
    lengths.append(np.asarray(ctx.length)[:3]) if number else None
    return think(job, ctx, number, *args)

  monkeypatch.setattr(irg, "think", spy)
  loaded = generator.load()
  settings = dataclasses.replace(loaded.settings, steps=6, think_limit=100)
  prompts, seeds = ["a red circle", "two blue stars", "a green ring"], [0, 1, 2]
  blind, sees = (draw(loaded, prompts, seeds, settings, loaded.defaults.system_prompt, size=4)
                 for draw in (phases.blind, generator.Generator.batch))
  np.testing.assert_array_equal(lengths[1] - lengths[0], 2 * (16 + 2))  # as latents and for the ViT
  assert len(lengths) == 2
  for a, b in zip(blind, sees):
    assert len(a.rounds) == 2 and a.rounds[0].thought == b.rounds[0].thought
    np.testing.assert_array_equal(a.rounds[0].image, b.rounds[0].image)
    assert a.rounds[1].thought.text and a.rounds[1].image.std() > 0


def test_the_cost_of_an_arm_is_that_of_its_stages_each_update_counted_once(tmp_path):
  (tmp_path / "irgl").mkdir()
  lines = [{"stage": stage, "step": step, "seconds": seconds, "samples": [[0, 1]] * 3}
           for stage, step, seconds in (("stage1", 1, None), ("stage1", 2, 1.0), ("stage2", 1, 2.0),
                                        ("stage2", 2, 4.0), ("stage2", 2, 5.0))]
  lines += [{"stage": "stage2", "step": 2, "skipped": {}}]
  (tmp_path / "irgl" / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  by_name = {arm.name: arm for arm in arms.ALL}
  read = lambda name: report.read_training(tmp_path, by_name[name])
  assert read("irg") == read("blind") == {"updates": 4, "samples": 12, "seconds": 8.0}
  assert read("stage1") == {"updates": 2, "samples": 6, "seconds": 1.0}
  assert read("base") is read("without1") is None


def drawn(right, grids=()):
  lines = {(i, 0, 1): {"grid": grid} for i, grid in enumerate(grids)}
  return benchmark.Drawn(None, ITEMS, np.array(right, float), lines, {}, {})


def test_the_best_of_two_is_the_mean_over_all_pairs():
  rng = np.random.default_rng(0)
  right = rng.integers(0, 2, (1, len(ITEMS), 4)).astype(float)
  got = figures.best_of_two(drawn(right))["by_prompt"]
  want = [np.mean([max(pair) for pair in itertools.combinations(row, 2)]) for row in right[0]]
  np.testing.assert_allclose(got, want, atol=1e-12)
  right[0, 3, 1:] = np.nan
  assert figures.best_of_two(drawn(right))["by_prompt"][3] is None


def test_choices_are_counted_where_the_prompt_leaves_them_open():
  items = [dataclasses.replace(ITEMS[0], extra={"include": include, "tag": "free", "world": "2"})
           for include in ([{"class": "circle", "count": 2}],
                           [{"class": "circle", "count": 1, "color": "red", "detail": "small"},
                            {"class": "heart", "count": 1, "position": ["above", 0]}])]
  grids = [["plain red circle", "dotted red circle"] + ["empty ground"] * 14,
           ["plain blue heart"] + ["empty ground"] * 3 + ["small red circle"]
           + ["empty ground"] * 11]
  found = dataclasses.replace(drawn([[[1.0], [1.0]]], grids), items=items)
  got = figures.open_choices(found, 1)
  assert got["cells"]["counts"] == {"A": 1, "B": 1}
  assert got["cells"]["entropy"] == pytest.approx(1 / 4)  # one bit of four
  assert got["colors"]["counts"] == {"blue": 1, "red": 2}
  assert got["colors"]["most"] == "red" and got["colors"]["share"] == pytest.approx(2 / 3)
  assert got["details"]["counts"] == {"dotted": 1, "plain": 2}
  assert figures.open_choices(found, 2) == dict.fromkeys(("cells", "colors", "details"))


def test_intervals_over_seeds_are_wider_where_seeds_disagree():
  tags = np.array(["a", "b"] * 40)
  rng = np.random.default_rng(1)
  alike = np.stack([(rng.random(80) < 0.5).astype(float)] * 3)
  apart = alike + np.array([[-0.2], [0.0], [0.2]])
  one, same, other = (figures.interval(x, tags) for x in (alike[0], alike, apart))
  width = lambda interval: interval["high"] - interval["low"]
  assert one["value"] == pytest.approx(same["value"]) == pytest.approx(other["value"])
  assert width(other) > 1.2 * width(same) and width(same) == pytest.approx(width(one), rel=0.15)


def test_the_report_has_a_column_for_each_seed(tmp_path):
  rng = np.random.default_rng(0)
  reports = []
  for gain in (0.1, 0.2):
    first = rng.integers(0, 3, len(ITEMS)) / 4
    reports.append({"arms": {"irg": {"rounds": {
        "1": {"by_prompt": first.tolist()}, "2": {"by_prompt": (first + gain).tolist()}}}}})
  folder = tmp_path / "seeds" / "2" / "report"
  folder.mkdir(parents=True)
  (folder / "report.json").write_text(json.dumps(reports[1]))
  got = figures.compare_seeds({0: reports[0]} | figures.read_seeds(tmp_path), ITEMS)
  change = got["rows"]["stage 2: round 2 less round 1"]
  assert [round(each["value"], 6) for each in change["each"]] == [0.1, 0.2]
  assert change["all"]["value"] == pytest.approx(0.15)
  assert 0.1 <= change["all"]["low"] + 1e-9 and change["all"]["high"] <= 0.2 + 1e-9
  assert set(got["rows"]) == {"stage 2, round 1", "stage 2, round 2",
                              "stage 2: round 2 less round 1"}
  shown = report.tables({"arms": {}, "differences": {}, "seeds": got})
  table, = (t for t in shown if t[0] == "Seeds of training")
  assert table[1][1:3] == ["seed + 0", "seed + 2"] and len(table[2]) == 3
