"""The record of a run's settings: what may be continued, and what is refused."""

import os

import pytest

from irg_jax import runs

SETTINGS = {"seed": 0, "mesh": {"data": 2}, "stage": {"steps": 4, "mixture": {"a": 1.0}},
            "sizes": (1, 2)}


def refused(recorded, now, **kwargs) -> str:
  with pytest.raises(ValueError) as e:
    runs.check_same(recorded, now, "--out run", **kwargs)
  return str(e.value)


def test_a_record_comes_back_the_same_whatever_json_makes_of_it(tmp_path):
  path = tmp_path / "new" / "run.json"
  runs.write(path, SETTINGS)
  runs.check_same(runs.read(path), SETTINGS, "--out run")
  assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_an_error_names_each_field_both_values_and_the_fix():
  now = SETTINGS | {"seed": 1, "stage": {"steps": 4, "mixture": {"a": 0.5}}}
  assert refused(SETTINGS, now, flag="--config.") == (
      "--out run: the run was started with seed=0, not 1; stage.mixture.a=1.0, not 0.5; give "
      "--config.seed=0 --config.stage.mixture.a=1.0 to continue it, or choose another folder")
  assert "give the same settings to continue it" in refused(SETTINGS, now)


def test_a_field_that_only_one_side_has_differs():
  assert "stage.mixture.b=(unset), not 2" in refused(
      SETTINGS, SETTINGS | {"stage": {"steps": 4, "mixture": {"a": 1.0, "b": 2}}})
  assert "seed=0, not (unset)" in refused(SETTINGS, {
      name: value for name, value in SETTINGS.items() if name != "seed"})
  assert "a=None, not (unset)" in refused({"a": None}, {})


def test_free_fields_and_groups_may_change_and_no_others():
  now = SETTINGS | {"seed": 1, "mesh": {"fsdp": 8}}
  runs.check_same(SETTINGS, now, "--out run", free=("seed", "mesh"))
  assert "mesh.data=2, not (unset)" in refused(SETTINGS, now, free=("seed", "me"))


def test_settings_of_older_versions_are_read_under_their_present_names():
  old = {"preset": "tiny", "rng": 0, "grid": {"data": 2}, **SETTINGS}
  del old["seed"], old["mesh"]
  known = {"free": ("preset",), "renamed": {"rng": "seed", "grid": "mesh"}}
  runs.check_same(old, SETTINGS, "--out run", **known)
  assert "seed=0, not 1" in refused(old, SETTINGS | {"seed": 1}, **known)


def test_the_first_process_that_creates_a_record_wins(tmp_path, monkeypatch):
  path = tmp_path / "run" / "run.json"
  runs.create(path, {"seed": 0})
  runs.create(path, {"seed": 1})
  assert runs.read(path) == {"seed": 0}

  def unsupported(*_):
    raise PermissionError("no links here")

  monkeypatch.setattr(os, "link", unsupported)
  runs.create(path, {"seed": 2})
  assert runs.read(path) == {"seed": 0}
  path.unlink()
  runs.create(path, {"seed": 3})
  assert runs.read(path) == {"seed": 3}
  assert [p.name for p in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"settings": 1}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path, content):
  path = tmp_path / "run.json"
  if content:
    path.write_text(content)
  with pytest.raises(ValueError, match="run.json: cannot be read as the record of a run"):
    runs.read(path, ("settings",))


def test_a_folder_of_something_else_is_refused(tmp_path):
  check = lambda: runs.check_folder(tmp_path / "out" / "run.json", "a training run")
  check()
  (tmp_path / "out" / ".aside").mkdir(parents=True)
  (tmp_path / "out" / ".0123abcd.partial").touch()  # of a process that starts at the same time
  check()
  (tmp_path / "out" / "thesis.txt").touch()
  with pytest.raises(ValueError, match="holds thesis.txt, but no run.json, so it is not a train"):
    check()
  (tmp_path / "out" / "run.json").touch()
  check()
