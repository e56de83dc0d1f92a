"""Makes the folders beside this file, with the code and the tests of the version in README.md.

  PYTHONPATH=.:tests python tests/data/before/make.py
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import irgl_rows
from judge_server import JudgeServer, prompt_of

BEFORE = pathlib.Path("tests", "data", "before")
FLAGS = json.loads((BEFORE / "flags.json").read_text().replace("BEFORE", str(BEFORE)))


def make_checkpoints():
  irg("init", "--config", "configs/tiny.py", *FLAGS["model"], "--out", BEFORE / "published")
  irg("convert", BEFORE / "published", BEFORE / "orbax", "--to", "orbax")


def make_generated():
  checkpoint = ["--checkpoint", BEFORE / "published"]
  irg("generate", "a fox", *FLAGS["draw"], *checkpoint, "--out", BEFORE / "trace")
  with JudgeServer(answer) as server:
    for name, flags in FLAGS["benchmarks"].items():
      out = ["--out", BEFORE / "eval" / name]
      irg("eval", "generate", name, *flags["prompts"], *flags["generate"], *FLAGS["draw"],
          *checkpoint, *out)
      judge = ["--judge-url", server.url, "--judge-model", "m"] if flags["judged"] else []
      irg("eval", "score", name, *flags["prompts"], *flags["score"], *judge, *out)


def irg(*arguments):
  """Runs the command `irg`."""
  subprocess.run([sys.executable, "-m", "irg_jax", *map(str, arguments)], check=True,
                 env=os.environ | {"JAX_PLATFORMS": "cpu", "OPENAI_API_KEY": "none"})


def make_data():
  """Four good rows and a bad one, built, then with their latents."""
  with tempfile.TemporaryDirectory() as rows:
    for mode in FLAGS["modes"]:
      irgl_rows.write_mode(
          pathlib.Path(rows), [*(row(mode, i) for i in range(4)), "[{"], mode)
    irg("data", "build", rows, "--out", BEFORE / "irgl", "--mode", *FLAGS["modes"],
        "--max-rejected", "0.5")
  irg("data", "encode-latents", BEFORE / "irgl", "--checkpoint", BEFORE / "published", "--out",
      BEFORE / "latents", "--mode", *FLAGS["modes"], "--size", 16, 32, 4)


def forget_where():
  """Makes absolute paths relative to the root of the project."""
  for path in (*BEFORE.rglob("commit_success.txt"), BEFORE / "train" / "run.json"):
    path.write_text(path.read_text().replace(f"{pathlib.Path.cwd()}/", ""))


def row(mode, number):
  image = lambda seed, **flags: irgl_rows.image(
      irgl_rows.picture(seed=seed, size=(16, 16)), **flags)
  seen = [image(number, need_vae=True, need_vit=True)] if mode.startswith("improving") else []
  return irgl_rows.turns(*seen, irgl_rows.text("t" * (5 + number)),
                         image(100 + number, need_loss=True), prompt=f"prompt {number}")


def make_training():
  """Two steps of stage 1, as if killed before its weights were written."""
  irg("train", "--config", "configs/irgl.py", "--config.preset=tiny", *FLAGS["model"],
      *FLAGS["train"], f"--config.data.path={BEFORE / 'irgl'}",
      f"--config.checkpoint={BEFORE / 'published'}", "--config.stage1.steps=2",
      "--out", BEFORE / "train")
  for name in ("tensorboard", "stage1/weights"):
    shutil.rmtree(BEFORE / "train" / name)


def answer(body):
  """The answer of the judge, in a form that every benchmark can parse."""
  text = prompt_of(body)
  if "Consistency" in text:
    return "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
  return "yes\nno" if "questions" in text else "OPEN" if "can be read" in text else "Yes"


def make_mini():
  """A run up to its first step, and the evaluation of its last model as if it were trained."""
  import irg_jax.mini.evaluate as evaluate  # of that version
  import irg_jax.mini.report as report
  # The first step's checkpoint stands for the last one.
  out = BEFORE / "mini"
  irg("mini", "run", "--out", out, "--until", "autoencoder", *FLAGS["mini"])
  drawn = out / evaluate.FOLDER / evaluate.FINAL.name
  evaluate.draw(evaluate.FINAL, out / "start" / "weights", drawn, evaluate.Size(1, 1, 1, 2))
  evaluate.score_new(drawn)
  report.make(out)
  left = [*out.rglob("*.safetensors"), out / "vae.msgpack", *out.glob("report/*.*")]
  for path in left:  # never read again
    if path.name != "report.json":
      path.unlink(missing_ok=True)



for step in (make_checkpoints, make_data, make_training, make_generated, make_mini,
             forget_where):
  step()
