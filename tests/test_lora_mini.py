"""An adapter teaches the model in the package a new mode.

`IRG_OPTIMIZED=1 pytest -m long tests/test_lora_mini.py`: it computes for a quarter of an hour on two
cores, and for much longer without XLA's optimisations, which tests leave out.

The mode is a mirror: things that are asked for on the left are drawn on the right. The adapter is
of the experts that draw alone, so plans stay as they are.
"""

import numpy as np
import pytest

import irg_jax
from conftest import ROOT
from irg_jax import commands, storage
from irg_jax.data import parquet
from irg_jax.data.records import assistant, image_part, text_part
from irg_jax.images import encode_image
from irg_jax.mini import scenes, thoughts, verifier, world

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("on_one_device")]
MODE, ROWS, TEST = "initial_full_learning", 2000, 48
SIZES = {"und": 224, "gen": 64, "vit": 0, "text": 1, "samples": 2}
SETTINGS = {
    "run_stages": "stage2", "lora.rank": 16, "lora.targets": "('gen',)", "stage2.steps": 400,
    "stage2.learning_rate": 2e-3, "stage2.warmup_steps": 20, "stage2.decay_steps": 200,
    "ema_decay": 0.98, "data.rows": 8, "checkpoint_every": 200,
    "stage2.mixture.initial_thinking_understanding_learning": 0.0} | {
        f"stage2.sizes.{name}": size for name, size in SIZES.items()}


def mirrored_rows(rng):
  """Prompt, plan as the model makes it, and the mirrored image, which alone is learned."""
  for _ in range(ROWS):
    record = world.training_record(rng)
    scene = scenes.sample_scene(record, rng)
    asked = [{"role": "user", "content": text} for text in (thoughts.SYSTEM_PROMPT,
                                                            record["prompt"])]
    yield MODE, [*asked, assistant([
        text_part(thoughts.plan(record, scene), need_loss=False),
        image_part(encode_image(scenes.paint(scene)[:, ::-1]), need_loss=True)])]


def right_in_a_mirror(images, records) -> float:
  """Share of images that are right in a mirror. Those without sides would be so anyhow."""
  return np.mean([verifier.score(image[:, ::-1], record).correct
                  for image, record in zip(images, records)])


def sided_records():
  """Test prompts that place a thing left or right of another one."""
  found = [r for r in world.test_records("position", 400, unseen=False)
           if any(way in ("left of", "right of") for _, way, _ in world.relations(r["include"]))]
  return found[:TEST]


def test_an_adapter_trained_on_a_new_mode_beats_the_model_without_it(tmp_path):
  parquet.write(tmp_path / "rows", mirrored_rows(np.random.default_rng(0)))
  run = lambda *words: commands.main([*map(str, words)])
  assert run("data", "build", tmp_path / "rows", "--out", tmp_path / "built", "--mode",
             MODE) == 0
  assert run("data", "encode-latents", tmp_path / "built", "--checkpoint", storage.SHIPPED, "--out",
             tmp_path / "data", "--size", 64, 64, 16, "--mode", MODE) == 0
  assert run("train", "--config", f"{ROOT}/configs/mini.py:base", "--data", tmp_path / "data",
             "--checkpoint", storage.SHIPPED, "--out", tmp_path / "run",
             *(f"--config.{name}={value}" for name, value in SETTINGS.items())) == 0
  records, shares = sided_records(), {}
  for scale in (0.0, 1.0):
    model = irg_jax.load(lora=tmp_path / "run" / "stage2" / "adapters", lora_scale=scale)
    drawn = model.generate([r["prompt"] for r in records], rounds=1, batch_size=TEST)
    shares[scale] = right_in_a_mirror([result.image for result in drawn], records)
  print(f"right in a mirror: {shares[0.0]:.3f} without the adapter, {shares[1.0]:.3f} with it")
  assert shares[0.0] < 0.05 and shares[1.0] > 0.5
