"""The examples of docs/forks.md: each patch applies to a copy of the project, and works there."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PATCHES = dict(zip(
    ("mode", "guidance rule", "head", "benchmark"),
    re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "forks.md").read_text(), re.DOTALL),
    strict=True))

# What the fork's user would do next; runs in the patched copy.
USES = {
    "mode": """
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
    "guidance rule": """
import numpy as np
from irg_jax import config, flow
from irg_jax.generate.settings import Settings
assert config.read(Settings(), None, ["later.renorm=none"]).later.renorm == "none"
full, no_text = np.float32([[[3.0, 4.0]]]), np.float32([[[1.0, 1.0]]])
guided = flow.guide({"full": full, "no_text": no_text}, 4.0, 1.0, "none", 0.0)
np.testing.assert_allclose(guided, no_text + 4 * (full - no_text), rtol=1e-6)
""",
    "head": """
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
    "benchmark": """
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
}


@pytest.mark.parametrize("name", PATCHES)
def test_an_example_of_a_fork_applies_and_works(name, tmp_path):
  patch, copy = PATCHES[name], tmp_path / "fork"
  assert 1 <= len(re.findall(r"^\+\+\+ ", patch, re.MULTILINE)) <= 2
  for folder in ("irg_jax", "configs"):
    shutil.copytree(ROOT / folder, copy / folder,
                    ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
  run = lambda *command, **options: subprocess.run(
      command, cwd=copy, capture_output=True, text=True, **options)
  applied = run("git", "apply", "-", input=patch)
  assert applied.returncode == 0, applied.stderr
  used = run(sys.executable, "-c", "import sys; sys.path.insert(0, '.')\n" + USES[name])
  assert used.returncode == 0, used.stderr
