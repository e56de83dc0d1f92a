"""Generated inputs, some 200 for each reader: each is read as an oracle says, or refused by name.

The oracles are numpy and this file's own writers, not the readers' code.
"""

import base64
import io
import os
import pathlib
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from irg_jax import images, storage
from irg_jax.commands import flags, generate
from irg_jax.data import parquet
from irg_jax.data.records import decode_base64

SEEDS = range(200)
# Characters at which `str.splitlines` breaks a line, though they end none.
INNER = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))


def noise(rng, *shape, high=256, kind=np.uint8):
  return rng.integers(0, high, shape, kind)


def sides(rng):
  return int(rng.integers(1, 40)), int(rng.integers(1, 40))


def saved(pixels, kind, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


# --- prompt files


def test_a_prompt_file_has_one_prompt_a_line_whatever_its_characters(tmp_path):
  path = tmp_path / "prompts.txt"
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    letters = list("abc é狐🦊\u202e" + INNER)
    prompts = ["x" + "".join(rng.choice(letters, rng.integers(0, 12))) + "x"
               for _ in range(rng.integers(1, 6))]
    text = "".join(p + str(rng.choice(["\n", "\r\n", "\r", "\n\n", " \n"])) for p in prompts)
    mark = str(rng.choice(["", "\ufeff"]))
    path.write_bytes((mark + text[:len(text) - int(rng.integers(2))]).encode())
    assert generate._read_prompts([], path) == tuple(prompts), seed


def test_files_are_split_at_line_feeds_alone():
  package = pathlib.Path(images.__file__).parent
  used = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")
          if "splitlines()" in path.read_text()}
  # Answers, as the published scripts do, and texts of libraries.
  assert used <= {"evaluate/answers", "evaluate/wise", "evaluate/tiif", "hub", "mini/report",
                  "plan/__init__", "plan/cost", "weights/orbax"}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "latin-1"])
def test_prompts_in_another_encoding_are_refused(tmp_path, encoding):
  path = tmp_path / "prompts.txt"
  for prompt in ("a fox in the café", "ein Fuchs\nmit Hütchen", "é"):
    path.write_bytes(prompt.encode(encoding))
    with pytest.raises(ValueError, match="prompts.txt: .*save it as UTF-8"):
      generate._read_prompts([], path)


def test_a_line_as_long_as_a_book_is_named_with_its_file(tmp_path):
  (tmp_path / "prompts.txt").write_text("a fox\n\n" + "x" * 2**19)
  with pytest.raises(ValueError, match="prompts.txt: line 3 has 524288 characters"):
    generate._read_prompts([], tmp_path / "prompts.txt")


def test_a_prompt_of_the_command_line_that_is_not_utf8_is_named():
  with pytest.raises(ValueError, match="prompt 2 is not UTF-8"):
    generate._read_prompts(["a fox", os.fsdecode(b"a f\xff")], None)


# --- images


def chunk(name, data):
  """A part of a PNG file."""
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rng, height, width, rows=None):
  """(PNG file of random colour type, depth and interlace by this function; RGB of its pixels).

  With `rows`, the pixels of the file end there, in a file that is complete otherwise.
  """
  kind, depth = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (6, 8),
                 (6, 16)][rng.integers(10)]
  channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
  values = noise(rng, height, width, channels, high=2**depth, kind=np.uint16)
  if kind == 0 and depth == 16:
    values[0, 0] = 2**16 - 1  # not all dark
  raw = []
  interlace = int(rng.integers(2))
  for x, y, dx, dy in PASSES if interlace else ((0, 0, 1, 1),):
    for line in values[y:rows:dy, x::dx]:
      if line.size:
        line = line.ravel()
        bits = (line[:, None] >> np.arange(depth)[::-1] & 1).astype(np.uint8)
        raw.append(b"\0" + np.packbits(bits).tobytes())
  data = zlib.compress(b"".join(raw))
  cut = int(rng.integers(len(data)))
  file = b"\x89PNG\r\n\x1a\n" + b"".join((
      chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)),
      chunk(b"IDAT", data[:cut]), chunk(b"IDAT", data[cut:]), chunk(b"IEND", b"")))
  eight = values >> 8 if depth == 16 else values * (255 // (2**depth - 1))
  rgb = np.repeat(eight[..., :1], 3, -1) if channels < 3 else eight[..., :3]
  if channels in (2, 4):
    alpha = eight[..., -1:] / 255
    rgb = np.rint(rgb * alpha + 255 * (1 - alpha))
  return file, rgb


def test_png_files_of_all_forms_are_read_to_the_level():
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    file, wanted = png(rng, *sides(rng))
    difference = images.decode_image(file, "a.png").astype(int) - wanted
    assert abs(difference).max() <= 1, seed  # of blending; the others are exact


def test_png_files_with_too_few_rows_are_refused_and_those_that_end_in_black_are_not():
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    height, width = sides(rng)
    file, _ = png(rng, height + 1, width, rows=int(rng.integers(1, height + 1)))
    with pytest.raises(ValueError, match="a.png: not an image that can be decoded"):
      images.decode_image(file, "a.png")
    pixels = noise(rng, height, width, 3)
    pixels[height // 2:] = 0
    np.testing.assert_array_equal(images.decode_image(saved(pixels, "PNG"), "b.png"), pixels)


def test_a_file_that_was_cut_is_refused_or_read_as_it_was():
  refused = 0
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    kind, options = [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}),
                     ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
                     ("AVIF", {}), ("JPEG2000", {})][seed % 10]
    file = saved(noise(rng, *sides(rng), 3), kind, **options)
    whole = images.decode_image(file, "a")
    try:
      got = images.decode_image(file[:int(rng.integers(len(file)))], "a")
      np.testing.assert_array_equal(got, whole)
    except ValueError as e:
      refused += str(e).startswith("a: not an image")
  assert refused > 180


def test_a_jpeg_file_that_was_cut_and_closed_is_refused_and_a_whole_one_never():
  refused = 0
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    height, width = sides(rng)
    pixels = noise(rng, height + 16, width + 16, 3)
    if seed % 3 == 0:
      pixels[height // 2:] = 128  # as what is filled in
    options = {"quality": int(rng.integers(30, 96)), "progressive": seed % 2 == 1,
               "subsampling": seed % 3, "restart_marker_blocks": int(rng.integers(3))}
    file = saved(pixels, "JPEG", **options)
    whole = images.decode_image(file, "a").astype(int)
    cut = int(rng.integers(file.find(b"\xff\xda") + 14, len(file) - 2))
    try:
      changed = abs(images.decode_image(file[:cut] + b"\xff\xd9", "a") - whole).max(-1) > 2
      assert not changed[:-17].any() and not changed[:, :-17].any(), seed  # of the last blocks
    except ValueError as e:
      refused += str(e).startswith("a: not an image")
  assert refused > 180


def test_tiff_files_with_too_few_strips_are_refused():
  for compression in (None, "tiff_lzw", "tiff_deflate", "packbits"):
    options = {"compression": compression} if compression else {}
    file = bytearray(saved(noise(np.random.default_rng(0), 64, 48, 3), "TIFF",
                           tiffinfo={278: 8}, **options))
    start = struct.unpack("<I", file[4:8])[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", file, start)[0], 12):
      if struct.unpack_from("<H", file, place)[0] in (273, 279):  # offsets and sizes of strips
        file[place + 4:place + 8] = struct.pack("<I", 3)
    with pytest.raises(ValueError, match="a.tiff: not an image"):
      images.decode_image(bytes(file), "a.tiff")


def test_deep_grey_is_scaled_from_a_known_white_or_refused_and_never_black():
  refused = 0
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    height, width = sides(rng)
    high = float(10 ** rng.uniform(0, 9))
    kind = (np.float32, np.int32, np.uint16)[seed % 3]
    grey = np.clip(rng.random((height, width)) * high, 0, 65535 if kind is np.uint16 else None)
    grey[0, 0] = high = min(high, 65535) if kind is np.uint16 else high
    grey = (grey / high if seed % 2 and kind is np.float32 else grey).astype(kind)
    try:
      got = images.decode_image(saved(grey, "TIFF"), "a.tiff")[..., 0].astype(int)
    except ValueError as e:
      assert str(e).startswith("a.tiff: not an image that can be decoded") and "8 bits" in str(e)
      refused += 1
      continue
    assert kind is not np.int32
    wanted = grey * 255.0 if kind is np.float32 else grey / 65535 * 255
    assert got.max() > 10 and abs(got - wanted).max() <= 1, seed
  assert 90 < refused < 180


@pytest.mark.parametrize("grey", [
    np.full((2, 2), np.nan, np.float32), np.float32([[0, 1.2]]), np.float32([[-0.1, 1]]),
    np.float32([[0, 255]]), np.int32([[0, 255]]), np.uint16([[0, 255]]), np.uint16([[0, 4095]])])
def test_grey_whose_white_is_unknown_is_refused(grey):
  with pytest.raises(ValueError, match="a.tiff: .*grey .*8 bits"):
    images.decode_image(saved(grey, "TIFF"), "a.tiff")


def test_deep_grey_of_other_formats_is_scaled():
  for high in (1023, 4095, 65535):
    pgm = f"P5 2 1 {high}\n".encode() + struct.pack(">HH", 0, high)
    assert images.decode_image(pgm, "p")[0, :, 0].tolist() == [0, 255]
  pfm = b"Pf\n3 1\n-1.0\n" + struct.pack("<fff", 0, 0.5, 1)
  assert images.decode_image(pfm, "p")[0, :, 0].tolist() == [0, 128, 255]
  black = np.zeros((2, 2), np.uint16)
  assert not images.decode_image(saved(black, "PNG"), "p").any()
  with pytest.raises(ValueError, match="0 is white"):
    images.decode_image(saved(black + 2**15, "TIFF", tiffinfo={262: 0}), "p")


def test_deep_colour_that_is_all_but_black_and_signed_levels_are_refused():
  made = lambda kind, *values: b"\x89PNG\r\n\x1a\n" + b"".join((
      chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)),
      chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))),
      chunk(b"IEND", b"")))
  for kind, values in ((4, (4095, 65535)), (2, (4095, 0, 9)), (6, (1023, 5, 9, 65535))):
    with pytest.raises(ValueError, match="a: .*16-bit colour that ends at .* 8 bits"):
      images.decode_image(made(kind, *values), "a")
    bright = tuple(16 * v for v in values[:-1]) + values[-1:]
    assert images.decode_image(made(kind, *bright), "a").max() > 15
  with pytest.raises(ValueError, match="signed levels"):
    images.decode_image(saved(np.zeros((2, 2), np.uint8), "TIFF", tiffinfo={339: 2}), "a")


@pytest.mark.parametrize("data", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    b"\xd7\xcd\xc6\x9a" + bytes(40), b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"8BPS\0\1" + bytes(40), b"SIMPLE  =                    T" + bytes(100)])
def test_other_formats_are_not_even_opened(data, monkeypatch):
  monkeypatch.setattr("subprocess.Popen", None)  # as Ghostscript would be
  with pytest.raises(ValueError, match="a: not an image .*none of AVIF, BMP"):
    images.decode_image(data, "a")


# --- base64


def test_base64_of_all_forms_is_read():
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    data = rng.bytes(int(rng.integers(0, 200)))
    text = (base64.urlsafe_b64encode if seed % 2 else base64.b64encode)(data).decode()
    text = text.rstrip("=") if rng.integers(2) else text
    if rng.integers(2):
      text = "\r\n".join(text[i:i + 76] for i in range(0, len(text), 76)) + "\n"
    head = ["", "data:image/png;base64,", "data:;base64,", "DATA:image/jpeg;charset=utf-8;Base64,"]
    assert decode_base64(head[rng.integers(4)] + text) == data, seed


def test_texts_that_are_no_base64_are_refused():
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    text = base64.b64encode(rng.bytes(int(rng.integers(3, 60)))).decode()
    digits, at = text.rstrip("="), int(rng.integers(1, 4))
    broken = [text[:at] + "=" + text[at:], text[:at] + "é*~@,\0"[rng.integers(6)] + text[at:],
              digits[:len(digits) // 4 * 4] + "A", text + "=", text + "A==",
              "data:image/png," + text, "data:image/png;base64" + text,
              "https://example.org/" + text + "?"]
    for one in broken:
      with pytest.raises(ValueError):
        decode_base64(one)


# --- parquet columns and files


def test_text_columns_of_all_arrow_types_are_read(tmp_path):
  plain = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
           pa.binary_view(), pa.json_(), pa.json_(pa.large_string())]
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    pick = lambda: None if rng.integers(5) == 0 else "[" + "ü🦊x"[rng.integers(3)] * int(
        rng.integers(30)) + "]"
    rows = [pick() for _ in range(rng.integers(1, 20))]
    kind = plain[seed % len(plain)]
    storage_type = getattr(kind, "storage_type", kind)
    of_bytes = "binary" in str(storage_type)
    values = [r.encode() if r is not None and of_bytes else r for r in rows]
    column = pa.array(values, storage_type)
    if kind is not storage_type:
      column = pa.ExtensionArray.from_storage(kind, column)
    elif seed % 3 == 0 and "view" not in str(kind):
      column = column.dictionary_encode()
    folder = tmp_path / str(seed) / "m"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"conversation": column}), folder / "a.parquet",
                   row_group_size=int(rng.integers(1, 9)))
    (file,) = parquet.mode_files(folder.parent, "m")
    assert list(parquet.iterate_texts(file)) == [r and r.encode() for r in rows], (seed, kind)


@pytest.mark.parametrize("column", [
    pa.array([1, 2]), pa.array([[{"role": "user"}]]), pa.array([None, None]),
    pa.array([1, 1]).dictionary_encode(), pa.array([b"ab"], pa.binary(2))])
def test_columns_of_other_types_are_refused(tmp_path, column):
  (tmp_path / "m").mkdir()
  pq.write_table(pa.table({"conversation": column}), tmp_path / "m" / "a.parquet")
  with pytest.raises(ValueError, match="a.parquet: column 'conversation' holds .*, not text"):
    parquet.mode_files(tmp_path, "m")


def test_hidden_files_are_passed_over_and_pipes_and_folders_are_named(tmp_path):
  folder = tmp_path / "m"
  folder.mkdir()
  pq.write_table(pa.table({"conversation": ["[]"]}), folder / "a.parquet")
  for name in ("._a.parquet", ".b.parquet", ".c.parquet"):
    (folder / name).write_bytes(b"\0" * 100)
  os.mkfifo(folder / ".d.parquet")
  assert [p.name for p in parquet.mode_files(tmp_path, "m")] == ["a.parquet"]
  for name, make in (("b", os.mkfifo), ("c", os.mkdir), ("d", lambda p: p.symlink_to("/dev/zero"))):
    make(path := folder / f"{name}.parquet")
    with pytest.raises(ValueError, match=f"{name}.parquet: not a file, but"):
      parquet.mode_files(tmp_path, "m")
    path.rmdir() if path.is_dir() else path.unlink()


# --- paths


@pytest.mark.parametrize("name", ["fifo", "zero"])
def test_a_pipe_or_device_is_no_file_of_text_or_pixels(tmp_path, name):
  path = tmp_path / name
  os.mkfifo(path) if name == "fifo" else path.symlink_to("/dev/zero")
  for read in (storage.read_file, images.read_image, lambda p: flags.read_text("--x", p)):
    with pytest.raises((ValueError, OSError), match="a pipe or device"):
      read(path)
  assert flags.read_text("--x", "/dev/null") == ""


@pytest.mark.parametrize("text", ["gs://bucket/x", "s3://b", "S3A://b/c", "http://h/x", "dbfs:/mnt",
                                  "file:///tmp/x", "hf://o/n", "abfs+ssl://x"])
def test_a_path_with_a_scheme_is_refused(text):
  with pytest.raises(ValueError, match="a path on this machine is wanted; copy"):
    storage.local_path(text)


@pytest.mark.parametrize("text", ["out/x", "/tmp/gs:/x", "a:b", "irgl.py:tiny", "C:/x"])
def test_other_paths_with_colons_are_paths(text):
  assert str(storage.local_path(text)) == text
