"""Stand-ins for the models behind `irg eval score`: a detector, a colour classifier, a scorer."""

import zlib


def detect(image, classes):
  """Two boxes of the first class, one of the second."""
  width, height = image.size
  box = lambda x: [x, 0, x + width // 2, height]
  return {classes[0]: [{"box": box(0), "score": 0.95}, {"box": box(width // 2), "score": 0.5}],
          classes[1]: [{"box": box(0), "score": 0.95}]}


def classify(crop, name):
  """One colour for everything."""
  del crop, name
  return "red"


def vqascore(path, prompt):
  """A number from 0 to 1 that depends on the image and the prompt."""
  return zlib.crc32(path.read_bytes() + prompt.encode()) % 1000 / 1000
