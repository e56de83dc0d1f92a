"""GenEval's boxes, from any detector and colour classifier that are given as functions.

  detect(image, classes)  ->  {class: [{"box": [x1, y1, x2, y2], "score": s, "mask": m}, ...]}
  classify(crop, name)      ->  one of geneval.COLORS

`image` is an RGB `PIL.Image`, upright; `classes` are the 80 names that GenEval uses. Boxes are in
pixels; every box that the detector has should come, whatever its score. `mask`, if there is one,
is a boolean array [height, width] of the object's pixels. `crop` shows one object `name`: the box,
and grey where the mask says that the object is not.

The official detector is Mask2Former with a Swin-S backbone, of mmdetection 2
(mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco); the official classifier is CLIP ViT-L-14 of
open_clip, weights "openai", for which `clip_classifier` has the rest. Scores with others are not
comparable with published ones.

A record, as the scores take it, is
  {"filename": "00000/samples/00000.png", "metadata": the prompt's official record,
   "detections": {class: [{"box": [...], "score": s, "color": c where a clause asks for it}]}}
or has "error": "reason: detail" in the place of "detections".
"""

import hashlib
import io
import pathlib

import numpy as np
from PIL import Image, ImageOps

from irg_jax.evaluate import geneval
from irg_jax.evaluate.record_log import RecordLog

CACHE = "detections_cache.jsonl"  # the usual name

_GREY = 153
_GIVE_UP_AFTER = 20  # images in a row: then it is the detector, not the images
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}",
              "a photo of a {color} object")


def records(images, classes, detect, classify, cache_path, names: str):
  """Yields one record an image, in order. An image is looked at once, whatever kills the run.

  Args:
    images: iterable of (path, filename, metadata): the file, and what its record shall hold.
    classes: the 80 names.
    detect, classify: see the top of this file; `classify` may be None where no colours are asked.
    cache_path: keeps the finished records, by the pictures' content.
    names: of the two functions; boxes of others are not taken from the cache.

  Raises:
    ValueError: one image after another failed.
  """
  failures = 0
  with RecordLog(cache_path, "digest") as log:
    for path, filename, metadata in images:
      record = {"filename": filename, "metadata": metadata}
      try:
        record["detections"] = _cached(pathlib.Path(path), metadata, tuple(classes), detect,
                                       classify, log, names)
      except _Failed as e:
        record["error"] = str(e)
      failures = failures + 1 if record.get("error", "").startswith("detector") else 0
      if failures >= _GIVE_UP_AFTER:
        raise ValueError(f"the detector failed at {failures} images in a row, lastly at {path}: "
                         f"{record['error']}")
      yield record


def class_names(path) -> tuple[str, ...]:
  """The names of an object_names.txt, one a line.

  Raises:
    ValueError: there are not 80 different ones.
  """
  names = tuple(pathlib.Path(path).read_text(encoding="utf-8").split("\n"))
  names = tuple(n.strip() for n in names if n.strip())
  if len(names) != 80 or len(set(names)) != 80:
    raise ValueError(f"{path}: holds {len(set(names))} different names, but GenEval has 80 classes")
  return names


def clip_classifier(encode_image, encode_text):
  """A `classify` function from the two halves of a CLIP model, by the official recipe.

  Args:
    encode_image: RGB `PIL.Image` -> [D], its own preprocessing included.
    encode_text: list of N texts -> [N, D].
  """
  weights = {}

  def classify(crop, name):
    if name not in weights:
      weights[name] = np.stack([_unit(np.mean([_unit(t) for t in np.asarray(encode_text(
          [template.format(color=color, name=name) for template in _TEMPLATES]))], axis=0))
          for color in geneval.COLORS])
    similar = weights[name] @ _unit(np.asarray(encode_image(crop)))
    return geneval.COLORS[int(np.argmax(similar))]

  return classify


def object_crop(image: Image.Image, box, mask=None) -> Image.Image:
  """What the colour classifier sees of a box: grey outside the mask, cut at the rounded box.

  Raises:
    ValueError: the mask is not of the picture's size, or the box holds no pixel.
  """
  if mask is not None:
    pixels, mask = np.array(image), np.asarray(mask, bool)
    if mask.shape != pixels.shape[:2]:
      raise ValueError(f"a mask {mask.shape} for an image {pixels.shape[:2]} (height, width)")
    pixels[~mask] = _GREY
    image = Image.fromarray(pixels)
  crop = image.crop(tuple(float(v) for v in box))
  if not crop.width or not crop.height:
    raise ValueError(f"the box {list(box)} holds no pixel")
  return crop


class _Failed(Exception):
  """Why an image has no boxes, as "reason: detail"."""


def _cached(path, metadata, classes, detect, classify, log, names):
  try:
    data = path.read_bytes()
  except OSError as e:
    raise _Failed(f"picture: {path}: {e.strerror or e}") from e
  colored = sorted({c["class"] for c in metadata.get("include", ()) if "color" in c})
  asked = repr((names, classes, metadata.get("tag"), colored)).encode()
  digest = hashlib.sha256(hashlib.sha256(data).digest() + asked).hexdigest()
  if (kept := log.get(digest)) is not None:
    return kept["detections"]
  try:
    with Image.open(io.BytesIO(data)) as opened:
      image = ImageOps.exif_transpose(opened).convert("RGB")
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise _Failed(f"picture: {path} cannot be read ({e})") from e
  try:
    found = _checked(detect(image, classes), classes)
    _add_colors(image, found, metadata, colored, classify)
  except Exception as e:  # a foreign function: one image that it cannot do is not the end
    raise _Failed(f"detector: {type(e).__name__}: {e}") from e
  for entry in (e for entries in found.values() for e in entries):
    entry.pop("mask", None)
  log.append({"digest": digest, "picture": str(path), "detections": found})
  return found


def _checked(found, classes):
  """Plain numbers, so that the record can be written; ValueError where the form is another."""
  result = {}
  for name, entries in found.items():
    if name not in classes:
      raise ValueError(f"a box of {name!r}, which is not among the classes")
    result[name] = []
    for entry in entries:
      box, score = [float(v) for v in entry["box"]], float(entry["score"])
      if len(box) != 4 or not np.isfinite([*box, score]).all():
        raise ValueError(f"a box of {name!r} is {box} with score {score}")
      result[name].append({"box": box, "score": score, "mask": entry.get("mask")})
  return result


def _add_colors(image, found, metadata, colored, classify):
  """Asks for the colours of the boxes that count, of classes whose colour is asked for."""
  for name in colored:
    numbered = [entry | {"color": i} for i, entry in enumerate(found.get(name, ()))]
    kept = geneval.kept_boxes({name: numbered}, metadata["tag"]).get(name, ())
    for entry in (found[name][box.color] for box in kept):
      if classify is None:
        raise ValueError("colours are asked for: name a classifier")
      entry["color"] = classify(object_crop(image, entry["box"], entry["mask"]), name)
      if entry["color"] not in geneval.COLORS:
        raise ValueError(f"the classifier says {entry['color']!r}, which is none of the colours")


def _unit(vector):
  vector = np.asarray(vector, np.float32)
  return vector / np.linalg.norm(vector)
