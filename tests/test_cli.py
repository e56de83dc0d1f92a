"""The command line: what it asks for, and what it says when something is wrong."""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import irg_jax
from irg_jax import commands
from irg_jax.commands import flags
from irg_jax.generate.settings import (
    SYSTEM_PROMPT, Defaults, Guidance, Settings, write_defaults)

ROOT = pathlib.Path(__file__).resolve().parents[1]
BENCHMARKS = ("geneval", "wise", "tiif", "genai_bench", "oneig", "mini", "mini2")


@pytest.fixture
def checkpoint(tmp_path):
  folder = tmp_path / "checkpoint"
  folder.mkdir()
  return str(folder)


@pytest.fixture
def asked(monkeypatch):
  """Runs `irg generate` up to the engine and returns the Inputs it would get."""
  from irg_jax.generate import run
  asked_for = []
  monkeypatch.setattr(run, "run_generate", asked_for.append)

  def call(*argv):
    assert commands.main(["generate", *map(str, argv)]) == 0
    return asked_for.pop()

  return call


def _status(*argv):
  try:
    return commands.main([str(a) for a in argv])
  except SystemExit as e:  # argparse's own errors
    return e.code


def _fails(capsys, *argv):
  """Runs a command that must end with status 2; returns the last line it printed."""
  assert _status(*argv) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert "Traceback" not in captured.err
  return captured.err.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", [(), ("generate",), ("convert",), ("init",)])
def test_help_shows_examples(capsys, verb):
  assert _status(*verb, "--help") == 0
  out = capsys.readouterr().out
  assert "examples:\n  irg " in out
  assert max(map(len, out.splitlines())) <= 100


def _flags(parser):
  """(command, action) of every flag and argument below a parser."""
  if fill := getattr(parser, "fill", None):
    fill(parser)
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for inner in action.choices.values():
        yield from _flags(inner)
    else:
      yield parser, action


def test_every_flag_that_names_a_path_refuses_a_scheme_that_it_cannot_read():
  words, found = {"DIR", "FILE", "PATH", "SRC", "DST", "OUT", "FOLDER"}, set()
  for parser, action in _flags(commands.make_parser()):
    name = (action.option_strings or [action.metavar])[-1]
    if words & set(re.findall(r"[A-Z]+", str(action.metavar))) and name != "--template":
      found.add(name)
      anywhere = action.type is flags.path
      for text in ("https://host/x", "hf://a/b", *(() if anywhere else ("gs://bucket/x", "s3://b"))):
        with pytest.raises(argparse.ArgumentTypeError, match="only paths of this machine, gs://"
                           if anywhere else "a path on this machine is wanted"):
          action.type(text)
  assert {"--out", "--config", "--data", "--checkpoint", "--prompts", "SRC", "DST", "--to",
          "--judge-cache", "--detections", "--image", "--questions"} <= found


@pytest.mark.parametrize("field", ["data.path", "checkpoint"])
def test_a_setting_that_is_a_path_refuses_a_scheme(capsys, tmp_path, field):
  line = _fails(capsys, "train", "--config", ROOT / "configs" / "irgl.py:tiny",
                f"--config.{field}=hf://owner/x", "--out", tmp_path / "run")
  assert f"config field '{field}' is hf://owner/x: only paths of this machine" in line
  assert not list(tmp_path.iterdir())


def test_a_template_with_a_scheme_is_refused(tmp_path):
  from irg_jax.evaluate import questions
  with pytest.raises(ValueError, match="--template hf://b/t.json: .*only paths of this machine"):
    questions.load_template("hf://b/t.json", "x")


def test_help_does_not_wait_for_jax():
  code = ("import sys; from irg_jax import commands\n"
          "try: commands.main(['generate', '--help'])\n"
          "except SystemExit: assert 'jax' not in sys.modules and 'numpy' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_module_and_command_are_the_same():
  out = subprocess.run([sys.executable, "-m", "irg_jax", "paint"], cwd=ROOT,
                       capture_output=True, text=True)
  assert out.returncode == 2
  assert "invalid choice: 'paint'" in out.stderr


def test_defaults_are_those_of_the_settings(asked, checkpoint):
  inputs = asked("a fox", "--checkpoint", checkpoint)
  assert inputs.prompts == ("a fox",)
  assert inputs.settings == Settings()
  assert inputs.system_prompt == SYSTEM_PROMPT.strip()
  assert (inputs.seed, inputs.batch_size) == (0, 1)
  assert inputs.mesh is inputs.dtype is None and inputs.images == ()
  assert inputs.out.parent == pathlib.Path("out")


def test_short_flags_set_their_fields(asked, checkpoint):
  inputs = asked(
      "--checkpoint", checkpoint, "--rounds", 3, "--size", "768x1024", "--steps", 25,
      "--text-scale", 2, "--image-scale", 1.5, "--think-limit", 64, "--temperature", 0.7,
      "--top-k", 40, "--top-p", 0.9, "--window", 1, "--no-think", "--mesh",
      "data=2,fsdp=2,tensor=2", "--dtype", "bfloat16", "--seed", 5, "--batch-size", 4, "a", "b")
  s = inputs.settings
  assert (s.rounds, s.width, s.height, s.steps) == (3, 768, 1024, 25)
  assert (s.think, s.think_limit, s.temperature) == (False, 64, 0.7)
  assert (s.top_k, s.top_p, s.window) == (40, 0.9, 1)
  assert s.first.text_scale == s.later.text_scale == 2.0
  assert (s.first.image_scale, s.later.image_scale) == (1.0, 1.5)
  assert inputs.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
  assert (inputs.dtype, inputs.seed, inputs.batch_size) == ("bfloat16", 5, 4)
  assert inputs.prompts == ("a", "b")


def test_short_flags_win_over_overrides_and_these_over_the_file(asked, checkpoint):
  inputs = asked(
      "a fox", "--rounds", 4, "--checkpoint", checkpoint, "--config.rounds=3",
      "--config", ROOT / "configs" / "generate_tiny.py", "--config.steps=7",
      "--config.later.interval=(0.1, 0.9)", "--greedy")
  assert (inputs.settings.rounds, inputs.settings.steps) == (4, 7)
  assert (inputs.settings.width, inputs.settings.temperature) == (64, 0.0)
  assert inputs.settings.later.interval == (0.1, 0.9)


def test_overrides_need_no_file(asked, checkpoint):
  inputs = asked("a fox", "--checkpoint", checkpoint, "--config.first.renorm=channel")
  assert inputs.settings.first.renorm == "channel"


def test_prompts_come_from_arguments_then_from_the_file(asked, checkpoint, tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_bytes("\ufeffein Füchslein\r\n\r\n  two dogs  \n".encode())
  inputs = asked("a fox", "--prompts-file", path, "--checkpoint", checkpoint)
  assert inputs.prompts == ("a fox", "ein Füchslein", "two dogs")


def test_a_prompt_may_look_like_a_flag_behind_two_dashes(asked, checkpoint):
  inputs = asked("--checkpoint", checkpoint, "--", "--config.rounds=3", "-5 degrees")
  assert inputs.prompts == ("--config.rounds=3", "-5 degrees")
  assert inputs.settings.rounds == 2


def test_the_system_prompt_can_be_replaced_or_left_out(asked, checkpoint, tmp_path):
  path = tmp_path / "system.txt"
  for text in ("Draw like a child.", ""):
    path.write_text(text + "\n")
    inputs = asked("a fox", "--system-prompt-file", path, "--checkpoint", checkpoint)
    assert inputs.system_prompt == text


def test_the_system_prompt_asks_for_both_thoughts():
  assert 100 <= len(SYSTEM_PROMPT.split()) <= 160
  for part in ("<think>", "</think>", "step-by-step", "comprehensive prompt"):
    assert part in SYSTEM_PROMPT


@pytest.mark.parametrize("argv, message", [
    (["paint"], "irg: error: argument VERB: invalid choice: 'paint'; known: generate, "),
    (["gnerate"], "invalid choice: 'gnerate' (did you mean generate?); known: "),
    (["eval", "genrate"], "irg eval: error: argument STEP: invalid choice: 'genrate' (did you mean"),
    (["eval", "score", "genevl", "--out", "x"], "'genevl' (did you mean geneval?); known: "),
    (["generate", "a", "--step", "3"],
     "irg generate: error: unrecognized arguments: --step 3 (did you mean --steps?); see "
     "irg generate --help"),
    (["generate", "a", "--steps", "3", "b"], "b; words without a flag stand together"),
    (["generate", "a", "--checkpoint", "d", "--rounds", "two"], "--rounds: 'two' is not a number of rounds; write 3, auto or auto:6"),
    (["generate", "a", "--checkpoint", "d", "--size", "0"], "--size: '0' is not a size"),
    (["generate", "a", "--checkpoint", "d", "--size", "64x"], "--size: '64x' is not a size"),
    (["generate", "a", "--checkpoint", "d", "--mesh", "data"], "--mesh: 'data' is not a mesh"),
    (["generate", "a", "--checkpoint", "d", "--mesh", "a=1,a=2"], "is not a mesh"),
    (["generate", "a", "--checkpoint", "d", "--dtype", "int8"], "--dtype: invalid choice"),
    (["convert", "a", "b"], "the following arguments are required: --to"),
    (["convert", "a", "b", "--to", "orbax", "--config.x=1"], "irg convert: error: has no configuration, so --config.x=1 means nothing"),
    (["init", "--out", "x"], "the following arguments are required: --config"),
])
def test_a_wrong_command_line_is_explained(capsys, argv, message):
  assert message in _fails(capsys, *argv)


@pytest.mark.parametrize("argv", [(), ("eval",), ("data",), ("mini",)])
def test_a_command_without_its_verb_shows_its_help(capsys, argv):
  assert _status(*argv) == 0
  captured = capsys.readouterr()
  assert captured.out.startswith(f"usage: {' '.join(('irg', *argv))} [-h]") and not captured.err


def test_the_version_is_that_of_the_package(capsys):
  assert _status("--version") == 0
  assert capsys.readouterr().out == f"irg_jax {irg_jax.__version__}\n"


def _shown(capsys, *argv):
  """Defaults in brackets of the short flags, by flag."""
  assert _status(*argv) == 0
  text = " ".join(capsys.readouterr().out.split("short flags of settings:")[1].split())
  return dict(re.findall(r"--([a-z-]+) [A-Z](?: or WxH)? (?:(?!--)[^(])*\(([^)]+)\)", text))


def test_help_shows_the_defaults_of_the_checkpoint(capsys, tmp_path):
  own = _shown(capsys, "generate", "--help")
  assert (own["steps"], own["size"], own["think-limit"], own["window"]) == ("20", "64", "319", "1")
  assert _shown(capsys, "eval", "generate", "--help") == own
  published = _shown(capsys, "generate", "--help", "--checkpoint", tmp_path)
  assert (published["steps"], published["size"], published["window"]) == ("50", "1024", "all")
  write_defaults(tmp_path, Defaults(settings=Settings(
      width=768, steps=9, later=Guidance(text_scale=2.0))))
  mine = _shown(capsys, "eval", "generate", f"--checkpoint={tmp_path}", "-h")
  assert (mine["steps"], mine["size"], mine["text-scale"]) == ("9", "768x1024", "4.0 and 2.0")


@pytest.mark.parametrize("settings", [[1], "x", 3, None, {"width": [1]}, {"first": 3}])
def test_help_is_shown_whatever_a_checkpoint_says(capsys, tmp_path, settings):
  (tmp_path / "generate.json").write_text(json.dumps({"settings": settings}))
  assert "steps" in _shown(capsys, "generate", "--help", "--checkpoint", tmp_path)


@pytest.mark.parametrize("line, want", [
    ("irg ge", ["generate"]), ("irg generate --st", ["--steps"]),
    ("irg generate a --dtype ", ["bfloat16", "float32"]), ("irg eval generate ", BENCHMARKS)])
def test_a_shell_completes_verbs_flags_and_benchmarks_without_jax(tmp_path, line, want):
  code = """
import os, sys
sys.argv = ["irg"]
os._exit = lambda status: print("jax" in sys.modules) or sys.exit(status)
from irg_jax import commands
commands.main()
"""
  shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": " ",
           "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "o"),
           "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
  run = subprocess.run([sys.executable, "-c", code], env=os.environ | shell, cwd=ROOT,
                       capture_output=True, text=True)
  assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr
  assert (tmp_path / "o").read_text().split() == list(want)


@pytest.mark.parametrize("argv, message", [
    ([], "no prompt: give a PROMPT or --prompts-file FILE"),
    (["  "], "prompt 1 is empty"),
    (["a", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
    (["a", "--seed", "-1"], "--seed -1: must be 0 or more"),
    (["a", "--seed", "4294967296"], "(SEED + 0) below 2**32"),
    (["a", "--image", "none.png"], "--image none.png: no such file"),
    (["a", "--prompts-file", "none.txt"], "--prompts-file none.txt: cannot be read (No such"),
    (["a", "--system-prompt-file", "none"], "--system-prompt-file none: cannot be read (No such"),
    (["a", "--config", "none.py"], "config file none.py: no such file"),
    (["a", "--config.round=3"], "--config.round: no field 'round' in the configuration (did you "
     "mean rounds?); its fields: "),
    (["a", "--config.later.renom=x"], "no field 'renom' in later (did you mean renorm?)"),
    (["a", "--config", "configs/generat.py"], "(did you mean configs/generate.py?)"),
    (["a", "--config.rounds=x"], "--config.rounds=x: invalid literal"),
    (["a", "--config.rounds"], "write it as --config.rounds=VALUE"),
    (["a", "--mesh", "date=2"], "--mesh: unknown mesh axes ['date']"),
])
def test_a_wrong_request_is_explained(capsys, checkpoint, argv, message):
  last = _fails(capsys, "generate", *argv, "--checkpoint", checkpoint)
  assert last.startswith("irg generate: error: ")
  assert message in last


def test_a_missing_checkpoint_is_named(capsys):
  assert "--checkpoint none: no such folder" in _fails(capsys, "generate", "a",
                                                       "--checkpoint", "none")
  assert "SRC none: no such folder" in _fails(capsys, "convert", "none", "x", "--to", "orbax")


@pytest.mark.parametrize("content, message", [
    (b"", "holds no prompt"),
    (b"\n  \n", "holds no prompt"),
    (b"caf\xe9\n", "not UTF-8 text (byte 3)"),
])
def test_a_bad_prompts_file_is_named(capsys, checkpoint, tmp_path, content, message):
  path = tmp_path / "prompts.txt"
  path.write_bytes(content)
  last = _fails(capsys, "generate", "--prompts-file", path, "--checkpoint", checkpoint)
  assert f"--prompts-file {path}: " in last and message in last


def test_debug_shows_where_an_error_comes_from(monkeypatch):
  monkeypatch.setenv("IRG_DEBUG", "1")
  with pytest.raises(ValueError, match="no such folder"):
    commands.main(["generate", "a", "--checkpoint", "none"])


def test_an_interruption_is_no_traceback(monkeypatch, capsys, checkpoint):
  from irg_jax.generate import run

  def interrupt(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(run, "run_generate", interrupt)
  assert _status("generate", "a", "--checkpoint", checkpoint) == 130
  assert capsys.readouterr().err == "irg generate: interrupted\n"


@pytest.mark.parametrize("config, out", [
    ("irgl.py", "train-paper"), ("irgl.py:tiny", "train-tiny"), ("mini.py", "train-irgl"),
    (None, "train-mine")])
def test_the_folder_of_a_training_is_named_after_its_preset(monkeypatch, tmp_path, config, out):
  from irg_jax.train import run
  asked_for = []
  monkeypatch.setattr(run, "run_train", lambda settings, out, _: asked_for.append(out))
  (tmp_path / "mine.py").write_text("from ml_collections import config_dict\n"
                                    "def get_config():\n  return config_dict.ConfigDict()\n")
  path = ROOT / "configs" / config if config else tmp_path / "mine.py"
  assert commands.main(["train", "--config", str(path), "--config.data.path=none"]) == 0
  assert asked_for == [pathlib.Path("out", out)]


def test_init_wants_a_model_configuration(capsys, tmp_path):
  out = tmp_path / "out"
  config = ROOT / "configs" / "generate.py"
  assert "has no field 'model'" in _fails(capsys, "init", "--config", config, "--out", out)
  config = ROOT / "configs" / "tiny.py"
  last = _fails(capsys, "init", "--config", config, "--config.model.llm.layers=1", "--out", out)
  assert "no field 'layers' in model.llm" in last
  last = _fails(capsys, "init", "--config", config, "--config.model.llm.num_heads=3", "--out", out)
  assert "'llm.num_heads' is 3, but must divide 64" in last
  assert not out.exists()


def test_an_unwritable_destination_is_named_before_weights_are_read(capsys, tmp_path):
  (tmp_path / "file").write_text("")
  out, config = tmp_path / "file" / "out", ROOT / "configs" / "tiny.py"
  assert "is not a folder" in _fails(capsys, "init", "--config", config, "--out", out)
  assert "is not a folder" in _fails(capsys, "convert", tmp_path, out, "--to", "orbax")
