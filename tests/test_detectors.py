"""GenEval's boxes and colours from functions of the user's own."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import official

from irg_jax import commands
from irg_jax.evaluate import clauses
from irg_jax.evaluate import geneval
from irg_jax.evaluate import score

CLASSES = ("dog", "car", "bus")
RED = {"tag": "colors", "prompt": "a photo of a red car",
       "include": [{"class": "car", "count": 1, "color": "red"}]}
PLAIN = {"tag": "single_object", "prompt": "a photo of a car",
         "include": [{"class": "car", "count": 1}]}


def box(*values, score=0.9, **more):
  return {"box": list(values), "score": score, **more}


@pytest.fixture
def image(tmp_path):
  pixels = np.zeros((20, 30, 3), np.uint8)
  pixels[5:10, 5:15] = (250, 0, 0)
  path = tmp_path / "00000.png"
  Image.fromarray(pixels).save(path)
  return path


def run(tmp_path, images, detect, classify=None, names="d"):
  return list(clauses.records(images, CLASSES, detect, classify, tmp_path / "cache.sqlite",
                                names))


def test_records_hold_what_the_verdict_needs(tmp_path, image):
  crops = []
  def classify(crop, name):
    crops.append((crop.size, name, np.asarray(crop).mean((0, 1)).tolist()))
    return "red"
  found = {"car": [box(5, 5, 15, 10), box(0, 0, 3, 3, score=0.2)], "dog": [box(1, 1, 9, 9)]}
  (record,) = run(tmp_path, [(image, "a/0.png", RED)], lambda _, classes: found, classify)
  assert crops == [((10, 5), "car", [250.0, 0.0, 0.0])]  # of the box that counts, and no other
  assert record["detections"]["car"][0] == box(5.0, 5.0, 15.0, 10.0) | {"color": "red"}
  assert len(record["detections"]["car"]) == 2 and "color" not in record["detections"]["dog"][0]
  assert official.score_image(json.loads(json.dumps(record)))["correct"]


def test_no_colour_is_asked_for_where_the_prompt_names_none(tmp_path, image):
  classify = lambda crop, name: pytest.fail("asked for a colour")
  (record,) = run(tmp_path, [(image, "a", PLAIN)], lambda i, c: {"car": [box(1, 1, 5, 5)]},
                  classify)
  assert official.score_image(record)["correct"]


def test_the_crop_is_grey_outside_the_mask_and_rounds_the_box():
  image = Image.new("RGB", (10, 8), (1, 2, 3))
  mask = np.zeros((8, 10), bool)
  mask[2:4, 2:4] = True
  crop = np.asarray(clauses.object_crop(image, (1.6, 1.4, 5.5, 6.5), mask))
  assert crop.shape == (5, 4, 3)  # Python rounds halves to even: 5.5 to 6, 6.5 to 6
  assert (crop[1:3, 0:2] == (1, 2, 3)).all() and (crop[3:] == 153).all()
  with pytest.raises(ValueError, match="mask"):
    clauses.object_crop(image, (0, 0, 5, 5), mask.T)
  with pytest.raises(ValueError, match="no pixel"):
    clauses.object_crop(image, (3, 3, 3.2, 8))


def test_masks_reach_the_classifier_and_not_the_record(tmp_path, image):
  mask = np.ones((20, 30), bool)
  mask[:, 10:] = False
  seen = []
  classify = lambda crop, name: seen.append(np.asarray(crop)) or "red"
  (record,) = run(tmp_path, [(image, "a", RED)],
                  lambda i, c: {"car": [box(5, 5, 15, 10, mask=mask)]}, classify)
  assert (seen[0][:, 5:] == 153).all() and (seen[0][:, :5] == (250, 0, 0)).all()
  assert "mask" not in record["detections"]["car"][0]


def test_an_upright_image_is_shown_whatever_the_camera_wrote(tmp_path):
  turned = Image.new("RGB", (30, 20))
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  turned.save(tmp_path / "p.jpg", exif=exif)
  sizes = []
  run(tmp_path, [(tmp_path / "p.jpg", "a", PLAIN)], lambda i, c: sizes.append(i.size) or {})
  assert sizes == [(20, 30)]


def test_a_image_is_looked_at_once_but_again_if_it_or_the_detector_changes(tmp_path, image):
  calls = []
  detect = lambda _, classes: calls.append(1) or {"car": [box(1, 1, 5, 5)]}
  one = [(image, "a", PLAIN)]
  first = run(tmp_path, one, detect)
  assert run(tmp_path, one, detect) == first and len(calls) == 1
  run(tmp_path, one, detect, names="other")
  assert len(calls) == 2
  Image.new("RGB", (9, 9)).save(image)
  run(tmp_path, one, detect)
  assert len(calls) == 3
  run(tmp_path, [(image, "a", RED)], detect, lambda crop, name: "red")  # now with colours
  assert len(calls) == 4


def test_what_cannot_be_detected_is_reported_and_the_rest_goes_on(tmp_path, image):
  torn = tmp_path / "torn.png"
  torn.write_bytes(image.read_bytes()[:40])
  kinds = iter([{"cat": []}, {"car": [box(1, 2, 3)]}, {"car": [box(1, 2, 3, float("nan"))]}, None,
                {}])
  def detect(_, classes):
    return next(kinds)
  others = []
  for i in range(5):
    path = tmp_path / f"{i}.png"
    Image.new("RGB", (4 + i, 4)).save(path)
    others.append((path, f"f{i}", PLAIN))
  images = [(tmp_path / "none.png", "none", PLAIN), (torn, "torn", PLAIN), *others]
  records = run(tmp_path, images, detect)
  assert [r["filename"] for r in records] == ["none", "torn", "f0", "f1", "f2", "f3", "f4"]
  reasons = [r.get("error", "").partition(":")[0] for r in records]
  assert reasons == ["picture", "picture", "detector", "detector", "detector", "detector", ""]
  assert records[-1]["detections"] == {} and "'cat'" in records[2]["error"]


def test_a_detector_that_always_fails_ends_the_run(tmp_path):
  for i in range(25):
    Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
  def detect(_, classes):
    raise RuntimeError("no weights")
  with pytest.raises(ValueError, match="20 images in a row.*no weights"):
    run(tmp_path, [(tmp_path / f"{i}.png", str(i), PLAIN) for i in range(25)], detect)


def test_colours_need_a_classifier_that_says_one_of_them(tmp_path, image):
  detect = lambda _, classes: {"car": [box(1, 1, 5, 5)]}
  (record,) = run(tmp_path, [(image, "a", RED)], detect)
  assert "name a classifier" in record["error"]
  (record,) = run(tmp_path, [(image, "a", RED)], detect, lambda crop, name: "crimson")
  assert "'crimson'" in record["error"]


def test_clip_takes_the_colour_nearest_to_the_mean_of_its_unit_texts():
  texts = []
  def encode_text(batch):
    texts.append(batch)
    index = next(i for i, c in enumerate(clauses.COLORS) if f" {c}" in batch[0])
    return [np.eye(10)[index] * scale for scale in (1.0, 50.0, 0.1)]
  classify = clauses.clip_classifier(lambda crop: np.eye(10)[clauses.COLORS.index(crop)] * 3,
                                       encode_text)
  assert [classify(color, "car") for color in clauses.COLORS] == list(clauses.COLORS)
  assert len(texts) == 10 and all(len(batch) == 3 for batch in texts)  # texts are encoded once
  tie = clauses.clip_classifier(lambda crop: np.ones(10), encode_text)
  assert tie(None, "car") == "red"


def test_the_command_scores_images_by_a_detector_and_a_classifier(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  (tmp_path / "my_models_for_test.py").write_text(
      "def detect(image, classes):\n"
      "  return {'bench': [{'box': [1, 1, 5, 5], 'score': 0.9}]} if image.width == 9 else {}\n"
      "def color(crop, name): return 'red'\n")
  item = geneval.GENEVAL.read()[0]
  assert item.extra["include"] == [{"class": "bench", "count": 1}]
  for image, size in enumerate((9, 8)):
    path = tmp_path / "out" / geneval.GENEVAL.image_path(item, image, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, 8)).save(path)
  command = ["eval", "score", "geneval", "--out", "out", "--detector", "my_models_for_test:detect",
             "--classifier", "my_models_for_test:color"]
  assert commands.main(command) == 0
  scores = json.loads((tmp_path / "out" / score.SCORES).read_text())
  assert scores["rounds"]["1"]["tasks"]["single_object"] == {"score": 0.5, "correct": 1, "count": 2}
  assert (tmp_path / "out" / geneval.DETECTIONS_CACHE).is_file()
  assert scores["protocol"]["detector"] == "my_models_for_test:detect"


def test_the_flags_default_to_the_official_options():
  flags, options = geneval.GENEVAL.flags, vars(clauses.Options())
  assert {name: flags[f"--{name.replace('_', '-')}"]["default"] for name in options} == options


def test_the_eighty_names_come_with_the_package():
  assert len(geneval.class_names(geneval.FILES / "object_names.txt")) == 80


def test_a_wrong_list_of_names_is_refused(tmp_path):
  (tmp_path / "names.txt").write_text("dog\ndog\n")
  with pytest.raises(ValueError, match="names.txt: holds 1 different"):
    geneval.class_names(tmp_path / "names.txt")


def test_a_function_is_found_by_name_in_the_working_directory(tmp_path):
  (tmp_path / "mine_for_test.py").write_text("def detect(image, classes): return {}\nx = 3\n")
  root = pathlib.Path(__file__).resolve().parents[1]
  code = ("from irg_jax.evaluate import score\n"
          "print(score.load_function('mine_for_test:detect', '--detector')(1, 2))")
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                        env=os.environ | {"PYTHONPATH": str(root)})
  assert done.stdout == "{}\n", done.stderr


@pytest.mark.parametrize("spec, words", [
    ("json", "MODULE:FUNCTION"), (":f", "MODULE:FUNCTION"), ("no_such_module_x:f", "cannot import"),
    ("json:no_such", "no function no_such"), ("json:__name__", "no function __name__")])
def test_a_function_that_is_not_there_is_named_with_its_flag(spec, words):
  with pytest.raises(ValueError, match=rf"--detector.*{words}"):
    score.load_function(spec, "--detector")
