"""The recipes of docs/forks.md: each patch applies to a copy of the project and works there.

With `-m long` the commands of each recipe are run as they stand, with only its patch.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "forks.md").read_text(),
                          re.DOTALL | re.MULTILINE))
PATCHES = {title: found[0] for title, text in RECIPES.items()
           if (found := re.findall(r"```diff\n(.*?)```", text, re.DOTALL))}

# What the fork's user would do next, in the patched copy.
USES = {
    "A mode": """
import pathlib, shutil
from irg_jax.data import sample_set, sources
from irg_jax.train import settings
loaded = settings.load("configs/irgl.py:tiny", ["data.path=data"])
assert loaded.stage2.mixture["critique_learning"] == 0.5
sample_set.write("data")
shutil.copytree("data/initial_full_learning", "data/critique_learning")
source = sources.open_source(pathlib.Path("data"), "critique_learning", max_rejected=0.1)
assert source[0].mode == "critique_learning" and len(source) == sample_set.ROWS
""",
    "A guidance rule": """
import numpy as np
from irg_jax import config, flow
from irg_jax.generate.settings import Settings
assert config.read(Settings(), None, ["later.renorm=none"]).later.renorm == "none"
full, no_text = np.float32([[[3.0, 4.0]]]), np.float32([[[1.0, 1.0]]])
guided = flow.guide({"full": full, "no_text": no_text}, 4.0, 1.0, "none", 0.0)
np.testing.assert_allclose(guided, no_text + 4 * (full - no_text), rtol=1e-6)
""",
    "A head": """
import jax, numpy as np
from irg_jax import sharding, weights
from irg_jax.config import read_model
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.weights import init
config = read_model("configs/tiny.py")
init.write_random_checkpoint("weights", config, 0)
config, params = weights.load_checkpoint("weights")
head = params["transformer"]["heads"]["quality"]
hidden = np.ones((2, 3, config.llm.hidden_size), np.float32)
out = UnifiedTransformer(config).apply({"params": params["transformer"]}, hidden,
                                       method=lambda m, x: m.heads.quality(x))
np.testing.assert_allclose(out, hidden @ head["kernel"] + head["bias"], rtol=1e-5)
sharding.parameter_shardings(params, sharding.make_mesh())
""",
    "A benchmark": """
from PIL import Image
from irg_jax.commands import main
open("prompts.jsonl", "w").write('{"prompt": "a lamp"}')
import pathlib
pathlib.Path("out/round1").mkdir(parents=True)
Image.new("RGB", (4, 4), (51, 51, 51)).save("out/round1/0.png")
assert main(["eval", "score", "bright", "--out", "out", "--prompts", "prompts.jsonl"]) == 0
assert main(["eval", "report", "out", "--to", "report"]) == 0
assert "0.200" in pathlib.Path("report/report.md").read_text()
""",
    "A task of the mini world": """
import numpy as np
from irg_jax.mini import benchmark, figures, report, run, scenes, thoughts, verifier, world
rng = np.random.default_rng(0)
drawn = [world.training_record(rng) for _ in range(400)]
assert 20 < sum(record["tag"] == "twins" for record in drawn) < 100
items = benchmark.MINI.read()
benchmark.MINI.check_counts(items)
assert [item.extra["tag"] == "twins" for item in items] == [False] * 264 + [True] * 48
for item in items[264:]:
  scene = scenes.sample_scene(item.extra, rng)
  assert verifier.score(scenes.paint(scene), item.extra).correct, item.prompt
  assert not verifier.judge(verifier.Seen("grey", scene.things[1:], ()), item.extra).correct
  assert thoughts.read_scene(thoughts.plan(item.extra, scene)) is not None
quick = run.load("configs/mini.py:quick")
chosen = [item.extra["tag"] for item in benchmark.select(quick.test_seen, quick.test_unseen)]
assert len(chosen) == quick.test_seen + quick.test_unseen and chosen.count("twins") >= 4
scores = figures.scores(np.ones(len(items)), items)
assert scores["seen"]["tasks"]["twins"]["prompts"] == 24
assert scores["unseen"]["tasks"]["twins"]["prompts"] == 24
""",
    "A reward": """
import numpy as np
from irg_jax.generate.irg import Round, Thought, Trajectory
from irg_jax.rl import rewards, settings
asked = settings.RlSettings(reward="brief=2.0")
with rewards.opened(asked, ".") as functions:
  rounds = [Round(Thought("a", tuple(range(n))), None, None, {}) for n in (0, 100)]
  found = rewards.of_trajectories(functions, [{}], [Trajectory("a lamp", rounds)])
np.testing.assert_allclose(rewards.mixed(found, asked.reward), [[2.0, 1.0]])
""",
}


def copied(folder):
  """Copies the project, without the weights in the package, as a fork would start."""
  for name in ("irg_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name,
                    ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
  return folder


def run(folder, *command, **options):
  """Runs a command in the copy; returns what it printed."""
  found = subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)
  assert found.returncode == 0, f"{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
  return found.stdout




@pytest.fixture(scope="module")
def faults(tmp_path_factory):
  """The traceback, or "", of each of `USES`, all in one process and one copy with all patches.

  No two recipes change the same file.
  """
  folder = copied(tmp_path_factory.mktemp("fork"))
  files = [file for patch in PATCHES.values() for file in re.findall(r"^\+\+\+ (.*)", patch, re.M)]
  assert len(files) == len(set(files))
  for patch in PATCHES.values():
    run(folder, "git", "apply", "-", input=patch)
  for name, use in USES.items():
    (folder / f"{name}.py").write_text(use)
  program = """
import contextlib, json, os, pathlib, sys, traceback
sys.path.insert(0, os.getcwd())
faults, root = {}, pathlib.Path.cwd()
with contextlib.redirect_stdout(sys.stderr):
  for use in sorted(root.glob("A *.py")):
    faults[use.stem] = ""
    try:
      exec(compile(use.read_text(), use, "exec"), {})
    except Exception:
      faults[use.stem] = traceback.format_exc()
print(json.dumps(faults))
"""
  return json.loads(run(folder, sys.executable, "-c", program))


def test_every_recipe_with_a_patch_is_used_here():
  assert list(USES) == list(PATCHES) and set(RECIPES) - set(PATCHES) == {"A kernel"}


@pytest.mark.parametrize("name", PATCHES)
def test_a_recipe_s_patch_applies_and_works(name, faults):
  assert 1 <= len(re.findall(r"^\+\+\+ ", PATCHES[name], re.MULTILINE)) <= 2
  assert not faults[name], faults[name]


# What each recipe says that its commands show: (output, folder of the copy) -> whether they do.


def _mode_has_losses(output, _):
  losses = [float(x) for x in re.findall(r'"ce/critique_learning": ([0-9.]+)', output)]
  return len(losses) >= 3 and min(losses) > 0


def _images_differ(_, folder):
  first, second = (np.asarray(Image.open(folder / "out" / name / "round1.png")).astype(int)
                   for name in ("global", "none"))
  return (np.abs(first - second).max(-1) > 16).mean() > 0.3


def _loss_falls(output, _):
  losses = [float(x) for x in re.findall(r"update \d+: loss ([0-9.]+)", output)]
  return len(losses) == 3 and losses[-1] < 0.1 * losses[0]


def _table_has_a_column(output, _):
  return re.search(r"\| Bright \|", output) and re.search(r"\| overall \| 0\.\d+", output)


def _table_has_the_task(output, _):
  return re.search(r"\| twins, seen \| [01]\.\d+", output)


def _rewards_are_logged(output, _):
  return len(re.findall(r'"reward/round[12]": [01]\.\d+', output)) == 4


EFFECTS = dict(zip(PATCHES, (_mode_has_losses, _images_differ, _loss_falls, _table_has_a_column,
                             _table_has_the_task, _rewards_are_logged), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("name", PATCHES)
def test_a_recipe_s_commands_show_its_effect(name, tmp_path):
  folder = copied(tmp_path / "fork")
  (folder / "irg_jax/mini/checkpoint").symlink_to(ROOT / "irg_jax/mini/checkpoint")
  run(folder, "git", "apply", "-", input=PATCHES[name])
  text = re.sub(r"```.*?```", "", RECIPES[name], flags=re.DOTALL)
  blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.MULTILINE)
  commands = textwrap.dedent("".join(block for block in blocks if block.strip()))
  program = f'set -e\nirg() {{ python -m irg_jax "$@"; }}\n{commands}'
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  output = run(folder, "bash", "-c", program, env=os.environ | {
      "PYTHONPATH": str(folder), "PATH": path, "XLA_FLAGS": ""})
  assert EFFECTS[name](output, folder), output
