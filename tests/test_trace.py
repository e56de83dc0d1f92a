"""Traces on disk: complete or absent, and pages that show every word and fetch nothing."""

import base64
import hashlib
import html
import html.parser
import itertools
import json
import re
import unicodedata

import markupsafe
import numpy as np
import pytest

from irg_jax import images
from irg_jax.reports import pages, trace

THOUGHT = '<think>\n### Plan\n1. two <b>circles</b> & "one" star\n\n  indented\n</think>'
VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
  """Collects tags, attributes and text; fails on tags that do not match up."""

  def __init__(self, content):
    super().__init__()
    self.tags, self.text, self._open = [], "", []
    self.feed(content)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text += data

  def named(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def image(width=48, height=32, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make_round(think=THOUGHT, seed=0, **fields):
  return {"think": think, "think_tokens": 21, "hit_limit": False, "picture": image(seed=seed),
          "seconds": {"think": 1.25, "draw": 2.5}} | fields


def make_trace(*rounds, **fields):
  return {"prompt": "two <circles> & a star", "system_prompt": "Think, then draw.", "seed": 7,
          "checkpoint": "weights", "settings": {"steps": 50, "round1": {"scale": 4.0}},
          "versions": {"irg_jax": "0"}, "rounds": list(rounds)} | fields


def written(folder):
  return sorted(p.name for p in folder.iterdir())


def page(folder, name="trace.html"):
  return Page((folder / name).read_text(encoding="utf-8"))


def test_a_trace_is_its_images_its_record_and_its_page(tmp_path):
  given = make_trace(make_round(), make_round("again", seed=1))
  trace.write_trace(tmp_path / "deep" / "run", given)
  folder = tmp_path / "deep" / "run"
  assert written(folder) == ["round1.png", "round2.png", "trace.html", "trace.json"]
  assert written(tmp_path / "deep") == ["run"]
  for number, entry in enumerate(given["rounds"], 1):
    np.testing.assert_array_equal(images.read_image(folder / f"round{number}.png"),
                                  entry["picture"])
  record = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
  assert [r["picture"] for r in record["rounds"]] == ["round1.png", "round2.png"]
  for number, r in enumerate(record["rounds"], 1):
    data = (folder / f"round{number}.png").read_bytes()
    assert r.pop("sha256") == hashlib.sha256(data).hexdigest()
  for r in record["rounds"] + given["rounds"]:
    r.pop("picture")
  assert record == given


def test_the_record_takes_numpy_numbers_and_paths(tmp_path):
  settings = {"a": np.float32(0.5), "b": np.arange(2), "c": tmp_path}
  trace.write_trace(tmp_path / "run", make_trace(make_round(), settings=settings))
  record = json.loads((tmp_path / "run" / "trace.json").read_text())
  assert record["settings"] == {"a": 0.5, "b": [0, 1], "c": str(tmp_path)}


def test_the_page_shows_every_word_in_the_order_of_the_run(tmp_path):
  given = make_trace(make_round(), make_round("second <think>", seed=1), note="only <noise>")
  trace.write_trace(tmp_path / "run", given)
  text = page(tmp_path / "run").text
  order = [given["prompt"], given["note"], "Plan", THOUGHT, "Image 1", "Reflection",
           "second <think>", "Final image", given["system_prompt"], "round1.scale"]
  places = [text.index(part) for part in order[:2]]
  for part in order[2:]:
    places.append(text.index(part, places[-1]))
  assert places == sorted(places)


def test_the_page_embeds_its_images_and_fetches_nothing(tmp_path):
  trace.write_trace(tmp_path / "run", make_trace(make_round(), make_round(seed=1)))
  content = page(tmp_path / "run")
  assert not {tag for tag, _ in content.tags} & {"script", "link", "iframe", "object"}
  assert not re.search(r"url\(|@import|https?:", (tmp_path / "run/trace.html").read_text())
  for number, image in enumerate(content.named("img"), 1):
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / f"run/round{number}.png").read_bytes()
    assert "two <circles> & a star" in image["alt"]


def test_the_page_of_an_edit_begins_with_the_image_that_was_edited(tmp_path):
  given = make_trace(make_round(), sources=[image(seed=2), image(seed=3)])
  trace.write_trace(tmp_path / "run", given)
  content = page(tmp_path / "run")
  assert content.text.index("Image to edit") < content.text.index("Plan")
  assert "Image to edit 1" in content.text and "Image to edit 2" in content.text
  for shown, wanted in zip(content.named("img"), given["sources"]):
    data = base64.b64decode(shown["src"].split(",")[1])
    np.testing.assert_array_equal(images.decode_image(data, "source"), wanted)
  assert "sources" not in json.loads((tmp_path / "run" / "trace.json").read_text())
  assert written(tmp_path / "run") == ["round1.png", "trace.html", "trace.json"]


@pytest.mark.parametrize("hostile", ["</h1><script>alert(1)</script>", '" onerror="x', "<!--",
                                     "&lt;"])
def test_nothing_a_user_or_model_wrote_becomes_markup(tmp_path, hostile):
  def pages(name, words):
    given = make_trace(make_round(words), prompt=words, system_prompt=words, note=words,
                       settings={words: {words: words}}, versions={words: words},
                       checkpoint=words)
    entry = trace.write_trace(tmp_path / name, given)
    trace.write_index(tmp_path, [entry])
    return page(tmp_path / name), page(tmp_path, "index.html")

  for got, plain in zip(pages("hostile", hostile), pages("plain", "harmless")):
    assert [(t, list(a)) for t, a in got.tags] == [(t, list(a)) for t, a in plain.tags]
    assert got.text.count(hostile) == plain.text.count("harmless") > 0


@pytest.mark.parametrize("thoughts, titles", [
    ([None], ["Image"]),
    ([THOUGHT], ["Plan", "Image"]),
    (["a", "b", "c", "d"], ["Plan", "Image 1", "Reflection", "Image 2", "Reflection",
                            "Image 3", "Reflection", "Final image"]),
])
def test_any_number_of_rounds_with_or_without_thoughts(tmp_path, thoughts, titles):
  rounds = [make_round(t, seed=i) for i, t in enumerate(thoughts)]
  trace.write_trace(tmp_path / "run", make_trace(*rounds))
  content = (tmp_path / "run" / "trace.html").read_text(encoding="utf-8")
  assert re.findall(r"<h2>(.*?)</h2>", content) == titles
  assert content.count("class=final") == 1


def test_thoughts_that_end_at_once_or_hit_the_limit_say_so(tmp_path):
  trace.write_trace(tmp_path / "run", make_trace(make_round(""), make_round("x", hit_limit=True)))
  text = page(tmp_path / "run").text
  assert "The thought ended at once." in text and "Cut off at the length limit." in text


def test_long_thoughts_are_folded_and_short_ones_are_not(tmp_path):
  trace.write_trace(tmp_path / "run", make_trace(make_round("word " * 2000), make_round("x")))
  content = page(tmp_path / "run")
  assert [a.get("class") for a in content.named("details")] == ["fold", None]
  assert "2,000 words" in content.text and content.text.count("word ") > 2000
  assert not any("open" in attrs for attrs in content.named("details"))


def cells(*things, letters="ABCDEFGHIJKLMNOP"):
  """A list of cells with `things` in the first of them."""
  return "Cells: " + " ".join(f"{at} {thing}" for at, thing in itertools.zip_longest(
      letters, things, fillvalue="empty ground")) + "."


def grids(content):
  """The cells of each grid of a page, row by row."""
  row_cells = lambda row: re.findall(r'<td [^>]*data-at="(.)">(.*?)</td>', row)
  tables = re.findall(r'<table class="cells"[^>]*>(.*?)</table>', content, re.DOTALL)
  return [list(map(row_cells, re.findall("<tr>.*?</tr>", table))) for table in tables]


def test_a_plan_is_drawn_as_a_grid_with_blank_cells_and_its_words_are_folded(tmp_path):
  plan = f"<think> Two things. Places: none. {cells('red <i>', 'blue star')} The end. </think>"
  twice = f"I see: {cells('a b')} Steps: none. Final prompt: {cells(letters='ABCD')}"
  trace.write_trace(tmp_path / "run", make_trace(make_round(plan), make_round(twice)))
  content = (tmp_path / "run/trace.html").read_text(encoding="utf-8")
  first, second, third = grids(content)
  assert [len(row) for row in first] == [4] * 4 and [len(row) for row in third] == [2] * 2
  assert sum(first, [])[:3] == [("A", "red &lt;i&gt;"), ("B", "blue star"), ("C", "")]
  assert [cell for _, cell in sum(second, [])] == ["a b"] + [""] * 15
  text = page(tmp_path / "run").text
  assert plan in text and twice in text and text.count("empty ground") == 14 + 15 + 4
  assert "Two things.\nPlaces: none." in text and "<b>Steps:</b> none." in content


def test_what_is_seen_is_drawn_with_greek_letters_and_its_marks():
  seen = cells("plain empty ground", "plain empty ground wrong", letters="αβγδεζηθικλμνξοπ")
  (shown,) = grids(str(pages.drawn(seen)))
  assert sum(shown, [])[:3] == [("α", ""), ("β", "plain empty ground wrong"), ("γ", "")]


@pytest.mark.parametrize("text", [
    cells("red circle").replace("B empty", "C empty"), cells(letters="ABC"), cells(letters="BCDE"),
    cells("red circle").replace("B empty", "β empty"),
    cells("x" * 61), "Cells: A cat", "Cells: A . B . C . D .", "Cells: A  B  C  D .",
    "cells: A a B b C c D d.", "Cells: none.", cells("a: b"), cells().removesuffix(".")])
def test_a_plan_that_cannot_be_read_stays_text(tmp_path, text):
  assert pages.drawn(text) is None
  trace.write_trace(tmp_path / "run", make_trace(make_round(text)))
  assert text in page(tmp_path / "run").text


def test_a_grid_has_control_characters_by_their_code_and_a_long_text_few_bytes():
  assert "[U+202E]" in pages.drawn(cells("\u202e")) and "\u202e" not in pages.drawn(cells("\u202e"))
  assert len(pages.drawn(cells(*"abcdefghijklmnop") * 100_000)) < 400_000


def test_small_images_are_enlarged_with_their_pixels_as_squares(tmp_path):
  entries = [trace.write_trace(tmp_path / str(width), make_trace(make_round(picture=image(width))))
             for width in (64, 256)]
  trace.write_index(tmp_path, entries)
  for content in (page(tmp_path / "64"), page(tmp_path / "256"), page(tmp_path, "index.html")):
    assert [i.get("class") for i in content.named("img")] in (["tiny"], [None], ["tiny", None])
  assert page(tmp_path, "index.html").named("img")[0]["class"] == "tiny"
  assert page(tmp_path / "64").named("img")[0]["class"] == "tiny"
  for width, wanted in ((64, "pixelated"), (256, "auto")):
    given = make_trace(make_round(cells("red circle"), picture=image(width)))
    shown = Page(pages.render("notebook", trace=given, rounds=trace.with_pngs(given)))
    assert f"image-rendering: {wanted}" in shown.named("img")[0]["style"]
    assert "red circle" in shown.text and "empty ground" not in shown.text
  assert not pages.small(b"broken") and not pages.small(tmp_path / "none") and not pages.small(None)


def test_an_answer_without_an_image_is_a_trace_too(tmp_path):
  entry = trace.write_trace(tmp_path / "run", make_trace(make_round("a cat", picture=None)))
  assert written(tmp_path / "run") == ["trace.html", "trace.json"]
  assert entry["image"] is None
  trace.write_index(tmp_path, [entry])
  assert not page(tmp_path, "index.html").named("img")


def test_an_earlier_trace_is_replaced_whole(tmp_path):
  folder = tmp_path / "run"
  trace.write_trace(folder, make_trace(make_round(), make_round()))
  trace.write_trace(folder, make_trace(make_round(seed=5)))
  assert written(folder) == ["round1.png", "trace.html", "trace.json"]
  assert written(tmp_path) == ["run"]


def test_a_failure_leaves_the_earlier_trace_and_nothing_else(tmp_path, monkeypatch):
  folder = tmp_path / "run"
  trace.write_trace(folder, make_trace(make_round()))
  before = (folder / "trace.json").read_bytes()

  def fail(*_, **__):
    raise RuntimeError("disk full")

  monkeypatch.setattr(pages, "render", fail)
  for name in ("run", "other"):
    with pytest.raises(RuntimeError, match="disk full"):
      trace.write_trace(tmp_path / name, make_trace(make_round(), make_round()))
  assert written(tmp_path) == ["run"]
  assert (folder / "trace.json").read_bytes() == before


def test_an_existing_folder_is_filled_not_renamed(tmp_path, monkeypatch):
  """It may be a mount point, or where the user's shell is."""
  (tmp_path / ".0123abcd.partial").mkdir()  # of a run that was killed
  monkeypatch.chdir(tmp_path)
  inode = tmp_path.stat().st_ino
  trace.check_trace_folder(".")
  trace.write_trace(".", make_trace(make_round()))
  assert tmp_path.stat().st_ino == inode
  assert written(tmp_path) == ["round1.png", "trace.html", "trace.json"]


def test_files_of_others_are_never_replaced(tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  for call in (lambda: trace.check_trace_folder(tmp_path),
               lambda: trace.write_trace(tmp_path, make_trace(make_round()))):
    with pytest.raises(ValueError, match="'thesis.txt', 1 in all.*another output folder"):
      call()
  assert written(tmp_path) == ["thesis.txt"]


def test_checking_a_trace_folder_leaves_nothing_behind(tmp_path):
  trace.check_trace_folder(tmp_path)
  trace.check_trace_folder(tmp_path / "a")
  assert written(tmp_path) == []


def test_the_index_links_each_trace_by_its_final_image(tmp_path):
  entries = [
      trace.write_trace(tmp_path / "a 1#", make_trace(make_round(), make_round())),
      trace.write_trace(tmp_path / "b", make_trace(make_round(None), prompt="second")),
  ]
  trace.write_index(tmp_path, entries)
  content = page(tmp_path, "index.html")
  assert [a["href"] for a in content.named("a")] == ["a%201%23/trace.html", "b/trace.html"]
  assert [i["src"] for i in content.named("img")] == ["a%201%23/round2.png", "b/round1.png"]
  assert "2 prompts" in content.text and "second" in content.text
  trace.write_index(tmp_path, entries[1:])
  assert "1 prompt" in page(tmp_path, "index.html").text
  assert written(tmp_path) == ["a 1#", "b", "index.html"]


def test_tokens_lost_when_a_thought_is_read_back_are_shown(tmp_path):
  lossy = make_round("a long thought") | {"tokens_cut": 7}
  trace.write_trace(tmp_path / "run", make_trace(lossy))
  assert "without its last 7 tokens" in (tmp_path / "run" / "trace.html").read_text()


# Control, direction and separator characters, which a page must show and not obey.
UNSEEN = [chr(c) for c in range(0x3000) if chr(c) not in "\t\n" and (
    unicodedata.category(chr(c)) in ("Cc", "Zl", "Zp")
    or unicodedata.bidirectional(chr(c)) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI",
                                             "PDI"))] + list("\u061c\u200e\u200f\ufeff")


@pytest.mark.parametrize("place", ["prompt", "system_prompt", "note", "think", "setting"])
def test_control_and_bidirectional_characters_are_shown_by_their_code(tmp_path, place):
  text = " ".join(f"a{c}b" for c in UNSEEN) + " <i> מילה\n\tend"
  fields = {"settings": {"name": text}} if place == "setting" else {place: text}
  record = (make_trace(make_round(text)) if place == "think" else
            make_trace(make_round(), **fields))
  entry = trace.write_trace(tmp_path / "t", record)
  trace.write_index(tmp_path, [entry])
  content = (tmp_path / "t" / "trace.html").read_bytes().decode()
  content += (tmp_path / "index.html").read_bytes().decode()
  assert not set(UNSEEN) & set(content)
  shown = Page((tmp_path / "t" / "trace.html").read_text(encoding="utf-8")).text
  assert all(f"a[U+{ord(c):04X}]b" in shown for c in UNSEEN)
  assert "<i> מילה\n\tend" in shown
  if place != "setting":  # the record keeps the text itself
    kept = json.loads((tmp_path / "t" / "trace.json").read_text(encoding="utf-8"))
    assert text in (kept.get(place), kept["rounds"][0]["think"])


def test_generated_texts_lose_no_other_character_in_a_page():
  letters = [*"ab <>&\"'\n\tאبé狐🦊\u200d\u00ad", *UNSEEN]
  for seed in range(200):
    rng = np.random.default_rng(seed)
    text = "x" + "".join(rng.choice(letters, 40)) + "x"
    wanted = "".join(c if c not in UNSEEN else f"[U+{ord(c):04X}]" for c in text)
    shown = html.unescape(str(pages.visible(markupsafe.escape(text))))
    assert shown == wanted.replace("[U+000D]\n", "\r\n"), seed
    assert pages.visible(text) == wanted.replace("[U+000D]\n", "\r\n")
