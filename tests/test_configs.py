"""Configuration files: their values, and reading them with overrides."""

import dataclasses
import functools
import pathlib
import re
import runpy
import sys

import pytest
from absl import flags

from irg_jax import config as config_lib
from irg_jax.commands import flags as command_flags
from irg_jax.generate.settings import Settings
from irg_jax.mini import run as mini_run
from irg_jax.train import settings as train_settings

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
MODELS = ("bagel_7b", "tiny", "bench")


def _model(name, *overrides):
  return config_lib.read_model(CONFIGS / f"{name}.py", overrides)


def _write(folder, text):
  path = folder / "custom.py"
  path.write_text("from ml_collections import config_dict\n" + text)
  return path


def test_every_configuration_file_is_covered_here():
  names = {p.stem for p in CONFIGS.glob("*.py")}
  assert names == {*MODELS, "generate", "generate_tiny", "irgl", "mini", "rl"}


@pytest.mark.parametrize("preset, model", [("paper", "bagel_7b"), ("tiny", "tiny")])
def test_presets_of_the_recipe_train_the_model_of_that_name(preset, model):
  ours = config_lib.read_model(f"{CONFIGS}/irgl.py:{preset}")
  assert (ours.llm, ours.vit, ours.vae) == tuple(
      getattr(_model(model), part) for part in ("llm", "vit", "vae"))


@pytest.mark.parametrize("preset", [
    *(f"{run}{name}" for run in ("", "quick-", "world2-", "world2-quick-")
      for name in ("base", "quality", "irgl"))])
def test_every_training_of_the_mini_world_is_one_that_irg_train_takes(preset):
  settings = train_settings.load(f"{CONFIGS}/mini.py:{preset}", ["data.path=none"])
  world = mini_run.load(f"{CONFIGS}/mini.py:{preset.rpartition('-')[0] or 'world'}")
  assert settings.model == world.model
  assert settings.data.vae_transform == world.generate.vae_transform
  assert settings.data.vit_transform == world.generate.vit_transform


@pytest.mark.parametrize("name", MODELS)
def test_model_sizes_fit_together(name):
  model = _model(name)
  llm, vit = model.llm, model.vit
  assert llm.hidden_size % llm.num_heads == 0
  assert llm.num_heads % llm.num_kv_heads == 0
  assert vit.hidden_size % vit.num_heads == 0
  assert llm.hidden_size % 4 == 0  # two halves of sine and cosine
  assert all(model.vae.ch * m % 32 == 0 for m in model.vae.ch_mult)  # 32 groups
  assert model.pixel_stride == 16


def test_bagel_7b_has_the_published_sizes():
  model = _model("bagel_7b")
  assert dataclasses.replace(model, dtype="float32") == config_lib.ModelConfig()
  assert model.dtype == "bfloat16"


@pytest.mark.parametrize("override, message", [
    ("model.llm.num_layers=0", "'llm.num_layers' is 0"),
    ("model.llm.num_heads=0", "'llm.num_heads' is 0"),
    ("model.llm.num_heads=3", "'llm.num_heads' is 3, but must divide 64"),
    ("model.llm.num_kv_heads=3", "'llm.num_kv_heads' is 3"),
    ("model.llm.hidden_size=4", "'llm.hidden_size' must be a multiple"),
    ("model.vae.ch_mult=(1, 0)", "'vae.ch_mult' is (1, 0)"),
    ("model.dtype=float17", "'dtype' is 'float17'"),
])
def test_sizes_that_make_no_model_are_named(override, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _model("tiny", override)


def test_bench_model_has_positions_for_its_images():
  model = _model("bench")
  assert model.vit.grid_size * model.vit.patch_size >= 252
  assert model.max_latent_size * model.pixel_stride >= 256


def test_overrides_reach_nested_fields_and_the_last_one_wins():
  model = _model("tiny", "model.llm.num_layers=4", "model.vae.ch_mult=(1,2)",
                 "model.dtype=bfloat16", "model.llm.rope_theta=10", "model.llm.num_layers=3")
  assert model.llm.num_layers == 3
  assert model.vae.ch_mult == (1, 2)
  assert model.dtype == "bfloat16"
  assert model.llm.rope_theta == 10.0


@pytest.mark.parametrize("override, message", [
    ("model.llm.num_layer=4", r"no field 'num_layer' in model\.llm .did you mean num_layers"),
    ("mode.llm=4", r"no field 'mode' in the configuration .did you mean model..; its fields: model"),
    ("model.llm=4", r"group of fields.*--config\.model\.llm\.num_layers"),
    ("model.llm.num_layers.x=4", r"no field 'x' in model\.llm\.num_layers"),
    ("model.llm.num_layers=four", r"--config\.model\.llm\.num_layers=four.*int"),
    ("model.llm.num_layers=4.5", r"--config\.model\.llm\.num_layers=4\.5"),
    ("model.vae.ch_mult=(1,two)", r"'vae\.ch_mult' is .*, but must hold int values"),
    ("model.vae.ch_mult=(1,0.5)", r"'vae\.ch_mult' is .*, but must hold int values"),
    ("model.llm.num_layers", r"write it as --config\.model\.llm\.num_layers=VALUE"),
])
def test_a_bad_override_is_named(override, message):
  with pytest.raises(ValueError, match=message):
    _model("tiny", override)


@pytest.mark.parametrize("text, message", [
    ("x = 1", r"custom\.py: has no function get_config"),
    ("def get_config(:", r"custom\.py: SyntaxError"),
    ("def get_config():\n  return 1 / 0", r"custom\.py: ZeroDivisionError: division by zero"),
    ("def get_config():\n  return {}", r"custom\.py: get_config\(\) returned a dict"),
    ("def get_config():\n  return config_dict.ConfigDict()['a']", r"custom\.py: .*'a'"),
])
def test_a_bad_file_is_named(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    config_lib.load(_write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"none\.py: no such file"):
    config_lib.load(tmp_path / "none.py")


def test_loading_touches_neither_global_flags_nor_modules(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["irg", "--config.model.llm.num_layers=9"])
  flag_names, modules = set(flags.FLAGS), set(sys.modules)
  assert _model("tiny", "model.llm.num_heads=2").llm.num_layers == 2
  assert set(flags.FLAGS) == flag_names
  assert not {m for m in set(sys.modules) - modules if "config" in m}


def test_generate_config_is_the_default_settings():
  assert config_lib.read(Settings(), CONFIGS / "generate.py") == Settings()


def test_tiny_settings_suit_the_tiny_model():
  settings, model = config_lib.read(Settings(), CONFIGS / "generate_tiny.py"), _model("tiny")
  settings.validate(model)
  assert settings.vae_transform.max_size <= model.max_latent_size * model.pixel_stride
  assert settings.vit_transform.max_size <= model.vit.grid_size * model.vit.patch_size


def test_a_settings_file_may_set_some_fields_only(tmp_path):
  path = _write(tmp_path, "def get_config():\n  return config_dict.ConfigDict("
                          "{'rounds': 3, 'later': {'interval': (0, 1), 'text_scale': 4}})")
  settings = config_lib.read(Settings(), path, ["rounds=4", "window=2", "think=false"])
  assert (settings.rounds, settings.window, settings.think) == (4, 2, False)
  assert settings.later == Settings().later
  assert settings.first == Settings().first


@pytest.mark.parametrize("fields, message", [
    ("{'round': 3}", r"custom\.py: config field 'round' is unknown .did you mean rounds..; known: .*rounds"),
    ("{'rounds': 'three'}", r"custom\.py: .*rounds"),
    ("{'rounds': None}", r"custom\.py: .*'rounds' is None, but must be int"),
    ("{'later': 3}", r"custom\.py: .*'later' is 3, but must be a group"),
    ("{'first': {'renorm': {'min': 0}}}", r"custom\.py: .*'first\.renorm' is {.*, but must be str"),
    ("{'first': {'interval': (0, 'a')}}", r"custom\.py: .*'first\.interval' is .*, but must hold float"),
])
def test_a_settings_file_with_a_wrong_field_is_named(tmp_path, fields, message):
  path = _write(tmp_path, f"def get_config():\n  return config_dict.ConfigDict({fields})")
  with pytest.raises(ValueError, match=message):
    config_lib.read(Settings(), path)


@dataclasses.dataclass(frozen=True)
class _Inner:
  size: int = config_lib.setting(2, "a size", low=1, high=4, was="width")


@dataclasses.dataclass(frozen=True)
class _Outer:
  inner: _Inner = _Inner()
  rate: float = config_lib.setting(0.5, "a rate", above=0)
  kind: str = config_lib.setting("a", "a kind", choices=("a", "b"))
  weights: dict[str, float] = config_lib.setting({"x": 1.0, "y": 0.0}, "weights", low=0)
  limit: int | None = config_lib.setting(None, "a limit", low=1)


@pytest.mark.parametrize("override, message", [
    ("inner.size=0", "config field 'inner.size' is 0, but must be at least 1"),
    ("inner.size=5", "config field 'inner.size' is 5, but must be at most 4"),
    ("rate=0", "config field 'rate' is 0.0, but must be above 0"),
    ("rate=nan", "config field 'rate' is nan, but must be finite"),
    ("kind=c", "config field 'kind' is 'c', not one of ('a', 'b')"),
    ("weights.y=-1", "config field 'weights.y' is -1.0, but must be at least 0"),
    ("weights.z=1", "no field 'z' in weights; its fields: x, y"),
    ("limit=x", "--config.limit=x: invalid literal"),
    ("limit=0", "config field 'limit' is 0, but must be at least 1"),
])
def test_a_setting_out_of_its_bounds_is_named(override, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    config_lib.read(_Outer(), overrides=[override])


@pytest.mark.parametrize("fields, message", [
    ({"weights": {"z": 1.0}}, "config field 'weights' has no 'z'; known: x, y"),
    ({"weights": 1.0}, "config field 'weights' is 1.0, but must be a group of fields"),
    ({"rate": "fast"}, "config field 'rate' is 'fast', but must be float"),
    ({"inner": {"size": 2.5}}, "config field 'inner.size' is 2.5, but must be int"),
    ({"inner": {"size": True}}, "config field 'inner.size' is True, but must be int"),
    ({"speed": 1}, "config field 'speed' is unknown; known: inner, rate"),
])
def test_a_field_of_another_form_is_named(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    config_lib.build(_Outer, fields)


def test_settings_come_back_from_their_config():
  settings = _Outer(inner=_Inner(size=3), weights={"x": 0.0, "y": 2.0}, limit=7)
  config = config_lib.to_config(settings)
  assert config_lib.build(_Outer, config) == settings
  assert config_lib.build(_Outer, dataclasses.asdict(settings)) == settings


def test_an_older_name_is_taken_with_a_note(tmp_path, capsys):
  path = _write(tmp_path, "def get_config():\n"
                          "  return config_dict.ConfigDict({'inner': {'width': 3}})")
  assert config_lib.read(_Outer(), path).inner.size == 3
  assert config_lib.read(_Outer(), overrides=["inner.width=4"]).inner.size == 4
  assert config_lib.build(_Outer, {"inner": {"width": 1}}).inner.size == 1
  assert capsys.readouterr().err.count("is now") == 3
  assert config_lib.renamed(_Outer) == {"inner.width": "inner.size"}


def test_a_preset_is_asked_for_by_the_name_of_the_file(tmp_path, capsys):
  path = _write(tmp_path, "def get_config(preset='one'):\n"
                          "  return config_dict.ConfigDict({'kind': {'one': 'a', 'two': 'b'}[preset]})")
  assert config_lib.read(_Outer(), path).kind == "a"
  assert config_lib.read(_Outer(), f"{path}:two").kind == "b"
  assert capsys.readouterr().err == ""
  assert config_lib.read(_Outer(), path, ["preset=two"]).kind == "b"
  assert f"--config.preset=two is now --config {path}:two" in capsys.readouterr().err
  with pytest.raises(ValueError, match="custom.py: .*'three'"):
    config_lib.read(_Outer(), f"{path}:three")


def test_the_tables_of_settings_are_those_of_the_code():
  made = runpy.run_path(str(CONFIGS.parent / "docs" / "settings.py"))["render"]()
  assert (CONFIGS.parent / "docs" / "settings.md").read_text(encoding="utf-8") == made, (
      "docs/settings.md is older than the code: run python docs/settings.py")


def test_parts_are_frozen_and_losses_switched_off_from_their_steps_on():
  stage = train_settings.StageSettings(freeze=train_settings.Freeze(gen=3, vit=0),
                                       loss_off=train_settings.LossOff(ce=5))
  switches = train_settings.Switches
  assert stage.switches(2) == switches(frozen=("vit",))
  assert stage.switches(3) == switches(frozen=("gen", "vit"))
  assert stage.switches(5) == switches(frozen=("gen", "vit"), losses=("mse",))


def test_short_flags_show_the_defaults_of_the_settings():
  for name, _, _, default in command_flags._SHORT:
    for field in command_flags.SHORTHANDS[name]:
      assert functools.reduce(getattr, field.split("."), Settings()) == default, name
