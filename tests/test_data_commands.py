"""`irg data`: output, files and exit status."""

import re
import subprocess
import sys

import irgl_rows
import pytest
from irgl_rows import BAD, MODE, write_mode

from irg_jax import commands
from irg_jax.data import check, sources
from irg_jax.data.records import MODES, parse_conversation
from irg_jax.tokenizer import write_byte_tokenizer


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "published"
  write_mode(root, [irgl_rows.good(i) for i in range(6)] + [row for row, _, _ in BAD.values()])
  return root


def _run(*argv):
  try:
    return commands.main(["data", *map(str, argv)])
  except SystemExit as e:
    return e.code


@pytest.mark.parametrize("step", [(), ("build",), ("check",)])
def test_help_shows_examples(capsys, step):
  assert _run(*step, "--help") == 0
  out = capsys.readouterr().out
  assert "examples:\n  irg data " in out
  assert max(map(len, out.splitlines())) <= 100


def test_build_reports_what_it_left_out(capsys, folder, tmp_path):
  assert _run("build", folder, "--out", tmp_path / "out", "--mode", MODE,
              "--max-rejected", 0.9) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0] == f"{MODE}: 6 of {6 + len(BAD)} rows usable"
  assert "  3 empty_text" in out
  assert any(line.startswith("  part-0.parquet row 6: bad_json: ") for line in out)
  assert out[-1] == f"wrote {tmp_path / 'out' / 'irgl'}"


def test_a_build_with_too_many_bad_rows_ends_with_2_and_leaves_nothing(capsys, folder, tmp_path):
  assert _run("build", folder, "--out", tmp_path / "out", "--mode", MODE) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert re.search(r"irg data: error: mode \w+: 10 of the first 16 of \d+ rows", captured.err)
  assert captured.err.count("\n  part-0.parquet row ") == 10
  assert not (tmp_path / "out").exists()


def test_check_counts_every_rejected_row(capsys, folder, tmp_path):
  page = tmp_path / "pages" / "check.html"
  assert _run("check", folder, "--mode", MODE, "--out", page, "--samples", 2) == 0
  out = capsys.readouterr().out
  assert out.startswith(f"{MODE}: 6 of {6 + len(BAD)} rows usable\n")
  assert sum(int(n) for n in re.findall(r"^  (\d+) \w+$", out, re.MULTILINE)) == len(BAD)
  html = page.read_text()
  for row, (_, reason, _) in enumerate(BAD.values(), 6):
    assert re.search(rf"<td>part-0.parquet</td><td class=n>{row}</td><td>{reason}</td>", html)
  assert [p.name for p in page.parent.iterdir()] == ["check.html"]


def test_the_page_is_self_contained_and_shows_samples(folder, tmp_path):
  page = tmp_path / "check.html"
  assert _run("check", folder, "--mode", MODE, "--out", page, "--samples", 2) == 0
  html = page.read_text()
  assert html.count('src="data:image/jpeg;base64,') == html.count("<img") == 4
  assert not re.search(r"https?:|<script|<link|url\(", html)
  assert html.count('class="tiny" style="width: 96px"') == 4  # small ones are enlarged
  assert "thought 0" in html and "24 × 20" in html and "<svg" in html
  assert "texts count in bytes" in html


def test_text_of_the_data_is_not_markup(tmp_path):
  write_mode(tmp_path, [irgl_rows.turns(irgl_rows.text("<script>alert(1)</script>")),
                        [{"role": "<b>", "content": ""}]])
  assert _run("check", tmp_path, "--mode", MODE, "--out", tmp_path / "a.html") == 0
  html = (tmp_path / "a.html").read_text()
  assert "&lt;script&gt;" in html and "<script" not in html and "<b>" not in html


def test_built_data_is_checked_alike(capsys, folder, tmp_path):
  sources.build(folder, tmp_path / "out", [MODE], max_rejected=0.9)
  lines = []
  for path in (folder, tmp_path / "out"):
    assert _run("check", path, "--mode", MODE, "--out", tmp_path / "a.html") == 0
    lines.append(capsys.readouterr().out)
  assert lines[0] == lines[1]


def test_a_mode_without_a_usable_row_is_shown_too(capsys, tmp_path):
  write_mode(tmp_path, ["{"])
  assert _run("check", tmp_path, "--mode", MODE, "--out", tmp_path / "a.html") == 0
  assert f"{MODE}: 0 of 1 rows usable\n  1 bad_json" in capsys.readouterr().out
  assert "No usable row" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("good, samples, rows", [
    (1, 3, [0]), (3, 3, [0, 1, 2]), (20, 3, [0, 8, 16]), (20, 1, [0])])
def test_samples_come_from_all_over_a_mode(tmp_path, good, samples, rows):
  row = irgl_rows.turns(irgl_rows.text("x"))
  write_mode(tmp_path, [row] * good + ["{"] * 20)
  report, = check.check(tmp_path, [MODE], samples=samples)
  assert [r.index for r in report.samples] == rows
  assert report.lengths["text"].tolist() == [10] * good


def test_lengths_are_what_the_model_counts():
  """Each split is framed by two tokens; an image brings both sizes of the training transforms."""
  row = irgl_rows.turns(
      irgl_rows.text("abc"),
      irgl_rows.image_part(irgl_rows.image(size=(512, 640)), need_loss=True, need_vae=True,
                           need_vit=True), prompt="x")
  record = parse_conversation(irgl_rows.as_row(row), MODE, 0)
  lengths = check.sample_lengths(record, len)
  vit = 37 * 46  # the nearest whole patches of 14 to 512 and 640
  assert lengths == {"text": (1 + 2) + (3 + 2) + 3 * 2, "latent": 2 * 32 * 40, "ViT": vit,
                     "total": 14 + 2 * 32 * 40 + vit}


def test_a_tokenizer_counts_tokens(folder, tmp_path):
  write_byte_tokenizer(tmp_path)
  page = tmp_path / "a.html"
  assert _run("check", folder, "--mode", MODE, "--out", page, "--tokenizer", tmp_path) == 0
  assert "texts count in bytes" not in page.read_text()


@pytest.mark.parametrize("argv, message", [
    (["build", "none", "--out", "x"], "SRC none: no such folder"),
    (["check", "none"], "PATH none: no such folder"),
    (["build", ".", "--out", "x", "--mode", "paint"], "--mode paint: unknown; the modes are"),
    (["build", ".", "--out", "x"], f"has no {MODES[0]}; choose among"),
    (["build", ".", "--out", "x", "--max-rejected", "2"], "2 is not a share from 0 to 1"),
    (["build", ".", "--out", "x", "--workers", "0"], "'0' is not 1 or more"),
    (["build", "."], "the following arguments are required: --out"),
    (["check", ".", "--out", "."], "--out .: is a folder; name a file"),
    (["check", ".", "--tokenizer", "none"], "--tokenizer none: no such folder"),
])
def test_a_wrong_request_is_explained(capsys, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  if argv[:1] == ["check"]:
    for mode in MODES:
      (tmp_path / mode).mkdir()
  assert _run(*argv) == 2
  captured = capsys.readouterr()
  assert message in captured.err and captured.out == ""
  assert not (tmp_path / "x").exists()


def test_help_waits_for_no_library():
  code = ("import sys; from irg_jax import commands\n"
          "try: commands.main(['data', 'build', '--help'])\n"
          "except SystemExit: assert not {'jax', 'numpy', 'pyarrow'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_page_shows_characters_that_would_turn_or_hide_its_text(folder, tmp_path):
  write_mode(folder, [irgl_rows.turns(irgl_rows.text(f"a{c}b"), prompt=f"c{c}d")
                      for c in "\u202e\x07\u2066"], MODES[0])
  page = tmp_path / "check.html"
  assert _run("check", folder, "--mode", MODES[0], "--out", page) == 0
  content = page.read_text(encoding="utf-8")
  assert not re.search("[\u202e\x07\u2066]", content)
  for code in ("202E", "0007", "2066"):
    assert f"a[U+{code}]b" in content and f"c[U+{code}]d" in content
