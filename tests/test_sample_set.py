"""The sample set: every mode, the same bytes each time, one unusable row of another kind in each."""

import pathlib

import pytest

from irg_jax import commands, images
from irg_jax.data import sample_set, sources
from irg_jax.data.records import MODES, ImagePart
from irg_jax.train import run as train_run
from irg_jax.train import settings

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data") / "sample"
  assert commands.main(["data", "sample", "--out", str(folder)]) == 0
  return folder


def files(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_is_the_same_each_time(folder, tmp_path):
  sample_set.write(tmp_path / "again")
  assert files(tmp_path / "again") == files(folder)
  assert sorted(files(folder)) == sorted(f"{mode}/00000.parquet" for mode in MODES)


def test_each_mode_has_its_usable_rows_and_one_unusable_row_of_its_own_kind(folder):
  found = sources.open_sources(folder, max_rejected=sample_set.MAX_REJECTED)
  assert {len(source) for source in found.values()} == {sample_set.ROWS}
  reasons = [source.metadata["rejected"] for source in found.values()]
  assert [list(r.values()) for r in reasons] == [[1]] * 6
  assert [list(r)[0] for r in reasons] == [
      "bad_json", "empty_text", "bad_picture", "unused_picture", "unknown_role", "bad_base64"]


def test_modes_see_and_learn_what_the_spec_says(folder):
  """docs/spec.md, section 5: (kind, learned, for the VAE, for the ViT) after the two prompts."""
  prompt = [("text", False)] * 2
  plan, given, target = ("text", True), ("text", False), ("image", True, False, False)
  seen, shown = ("image", False, False, True), ("image", False, True, True)
  want = dict(zip(MODES, (
      [seen, plan], [plan], [plan, target], [seen, seen, plan], [given, shown, plan],
      [given, shown, plan, target])))
  for mode, source in sources.open_sources(folder, max_rejected=1.0).items():
    for record in source:
      parts = [("image", p.need_loss, p.need_vae, p.need_vit) if isinstance(p, ImagePart) else
               ("text", p.need_loss) for p in record.parts]
      assert parts == prompt + want[mode]


def test_images_differ_where_something_is_to_be_improved(folder):
  source = sources.open_source(folder, MODES[5], max_rejected=1.0)
  sizes = set()
  for record in source:
    first, second = (images.decode_image(p.data, "image") for p in record.parts
                     if isinstance(p, ImagePart))
    assert first.shape == second.shape and (first != second).any()
    sizes.add(first.shape)
  assert len(sizes) == 3
  assert len({record.parts[1].text for record in source}) == sample_set.ROWS


def test_a_folder_that_holds_something_is_refused(folder, capsys):
  assert commands.main(["data", "sample", "--out", str(folder)]) == 2
  assert "exists and is not an empty folder" in capsys.readouterr().err


def test_the_tiny_preset_trains_on_it_with_nothing_given(folder, tmp_path):
  tiny = settings.load(f"{ROOT}/configs/irgl.py:tiny")
  run = train_run.prepare(tiny, tmp_path / "out", stopping=None, clock=None)
  want = sources.open_sources(folder, max_rejected=sample_set.MAX_REJECTED)
  number = lambda record: record.index
  for mode, source in want.items():
    assert 0 < len(run.held_out[mode]) < len(source) / 2
    assert sorted([*run.sources[mode], *run.held_out[mode]], key=number) == list(source)
  again = train_run.prepare(tiny, tmp_path / "out", stopping=None, clock=None)
  assert list(again.sources[MODES[5]]) == list(run.sources[MODES[5]])
