"""README.md: its commands and its Python run as they stand, in a copy of the project.

What a reader brings (weights, prompts, a photo, data) is made first, and tiny. The suite draws with
a stand-in; the long tests run each command in a process of its own, and really draw. What costs
hours, a judge or an accelerator is parsed by the command line's parser.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from engine import make_checkpoint, stand_in
from irg_jax import commands
from irg_jax.data import parquet, sample_set
from irg_jax.data.records import MODES
from irg_jax.generate import irg

README = (ROOT / "README.md").read_text(encoding="utf-8")
_JOINED = README.replace("\\\n", " ")
COMMANDS = [re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip()
            for line in re.findall(r"^    ((?:irg|bash|python|pip) .*)", _JOINED, re.MULTILINE)]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# Beginnings of commands that are only parsed here, and why.
PARSED = {
    "bash launch/test.sh": "runs these tests",
    "irg data encode-latents": "tests/test_latents.py; below with a smaller size",
    "irg train --config configs/irgl.py --data": "the model of 7B",
    "irg plan": "compiles for TPUs, see tests/test_plan.py",
    "irg eval": "official files and a judge, see tests/test_eval_whole.py",
    "irg mini": "hours, see tests/test_mini_run.py",
    "irg rl": "minutes, see tests/test_rl_run.py",
    "irg serve": "serves until it is stopped, see tests/test_serve_process.py",
    "irg demo": "likewise, see tests/test_demo.py",
}
LONG = ("irg train --config configs/irgl.py:tiny", "bash launch/demo.sh")  # minutes
RUN = [c for c in COMMANDS if not c.startswith(tuple(PARSED))]
QUICK = [c for c in RUN if not c.startswith(LONG)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  """A copy of the project, with what a reader has."""
  root = tmp_path_factory.mktemp("fresh") / "clone"
  shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
      ".*", "__pycache__", "*.egg-info", "out", "build", "dist", "tests"))
  make_checkpoint(root / "weights" / "irg-7b")
  shutil.copytree(root / "weights" / "irg-7b", root / "weights" / "bagel-7b")
  (root / "prompts.txt").write_text("a fox\ntwo dogs in the rain\na lamp\n")
  Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(root / "photo.png")
  for mode in MODES:
    rows = [(mode, sample_set.conversation(mode, number)) for number in range(4)]
    parquet.write(root / "irgl-parquet", rows)
  return root


@pytest.fixture
def quick(clone, monkeypatch):
  """Commands of this process, in the copy, with a stand-in for drawing."""
  monkeypatch.chdir(clone)
  shutil.rmtree("out", ignore_errors=True)  # the default folder is named by the second
  monkeypatch.setattr(irg, "generate", stand_in)
  return clone


def test_the_commands_are_found():
  verbs = {c.split()[1] for c in COMMANDS if c.startswith("irg ")}
  assert verbs >= {"generate", "data", "train", "plan", "eval", "mini"}
  assert len(COMMANDS) >= 15 and len(QUICK) >= 5 and len(SNIPPETS) == 2
  for start in (*PARSED, *LONG):
    assert any(c.startswith(start) for c in COMMANDS), start


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_and_its_files_are_there(command):
  program, *words = shlex.split(command)
  for word in words:
    if word.startswith(("configs/", "launch/", "benchmarks/", "docs/")):
      assert (ROOT / word.partition(":")[0]).is_file(), word
  if program == "irg":
    flags = [word for word in words if not word.startswith("--config.")]
    assert callable(commands.make_parser().parse_args(flags).run)
  if program == "bash":
    subprocess.run(["bash", "-n", ROOT / words[0]], check=True)


@pytest.mark.parametrize("command", QUICK)
def test_a_quick_command_runs_as_it_stands(quick, command):
  assert commands.main(shlex.split(command)[1:]) == 0


def test_the_snippet_runs_as_it_stands(quick, capsys):
  exec(next(text for text in SNIPPETS if "irg_jax" in text), {"__name__": "__main__"})
  assert len(capsys.readouterr().out.split()) == 2  # thoughts
  assert {"round1.png", "round2.png", "trace.json", "trace.html"} == {
      path.name for path in (quick / "out" / "stars").iterdir()}


def test_what_the_text_names_is_there():
  for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
    assert (ROOT / target).exists(), target
  for path in re.findall(r"`((?:irg_jax|configs|launch|benchmarks|docs|examples)/[\w./]*)", README):
    assert (ROOT / path).exists(), path
  for path in re.findall(r"`python (\S+\.py)", README):
    assert (ROOT / path).is_file(), path
  extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
  for extra in re.findall(r'"\.\[(\w+)\]"', README):
    assert re.search(rf"^{extra} =", extras, re.MULTILINE), extra
  for words in re.findall(r"`irg ([a-z]+)", README):
    with pytest.raises(SystemExit) as left:
      commands.make_parser().parse_args([words, "--help"])
    assert left.value.code == 0


@pytest.fixture(scope="module")
def shell(clone):
  """Runs a line of the shell in the copy, where `irg` and `python` are those of the copy."""
  tools = clone.parent / "venv" / "bin"
  tools.mkdir(parents=True)
  pip = 'case "$*" in "-m pip install"*) exit 0;; esac\n'  # of the launch scripts
  for name, body in (("python", f'{pip}exec {sys.executable} "$@"'),
                     ("irg", f'exec {sys.executable} -m irg_jax "$@"')):
    (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tools / name).chmod(0o755)
  kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment = kept | {
      "PATH": f"{tools}:{os.environ['PATH']}", "IRG_VENV": str(tools.parent),
      "PYTHONPATH": str(clone), "JAX_PLATFORMS": "cpu"}

  def run(line):
    done = subprocess.run(["bash", "-c", line], cwd=clone, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout

  return run


@pytest.mark.long
@pytest.mark.parametrize("command", RUN)
def test_a_command_runs_in_a_fresh_clone(shell, command):
  shell(command)


@pytest.mark.long
def test_the_snippet_runs_in_a_fresh_clone(shell, clone):
  (clone / "snippet.py").write_text(next(text for text in SNIPPETS if "import irg_jax" in text))
  assert "red circle" in shell("python snippet.py")


@pytest.mark.long
def test_the_data_that_the_readme_makes_trains_the_tiny_preset(shell):
  command, = (c for c in COMMANDS if c.startswith("irg data encode-latents"))
  shell("test -d irgl || irg data build irgl-parquet --out irgl")
  shell(f"{command} --size 32 128 16")
  shell("irg train --config configs/irgl.py:tiny --data irgl-latents --out out/latents"
        " --config.data.streams=2 --config.stage1.steps=2 --config.stage2.steps=2"
        " --config.model.llm.num_layers=1 --checkpoint weights/bagel-7b")
