"""Atomic writes: complete content or the earlier one, and no temporary file left."""

import os

import pytest

from irg_jax import storage


def written(folder):
  return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_on_success_only(tmp_path):
  path = tmp_path / "a"
  storage.write_text(path, "old")
  with pytest.raises(KeyError), storage.atomic_file(path) as temporary:
    temporary.write_text("half")
    assert temporary.parent == tmp_path and path.read_text() == "old"
    raise KeyError
  assert path.read_text() == "old" and written(tmp_path) == ["a"]
  with storage.atomic_file(path) as temporary:
    temporary.write_text("new")
  assert path.read_text() == "new" and written(tmp_path) == ["a"]


def test_json_and_texts_are_written_as_utf8(tmp_path):
  storage.write_json(tmp_path / "a", {"b": [1]})
  assert (tmp_path / "a").read_bytes() == b'{\n  "b": [\n    1\n  ]\n}\n'
  storage.write_json(tmp_path / "a", {"b": "\u00fc"}, indent=None, ensure_ascii=False)
  assert (tmp_path / "a").read_bytes() == '{"b": "\u00fc"}\n'.encode()
  storage.write_text(tmp_path / "a", "x\ud800")
  assert (tmp_path / "a").read_bytes() == b"x?"


def test_a_temporary_file_may_be_elsewhere(tmp_path):
  (tmp_path / "aside").mkdir()
  with storage.atomic_file(tmp_path / "a", tmp_path / "aside") as temporary:
    temporary.write_text("x")
    assert written(tmp_path / "aside") == [temporary.name]
  assert written(tmp_path) == ["a", "aside"] and not written(tmp_path / "aside")


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_complete_or_not_at_all(tmp_path, exists):
  folder = tmp_path / "new" / "folder"
  if exists:
    folder.mkdir(parents=True)
  with pytest.raises(KeyError), storage.atomic_folder(folder) as partial:
    (partial / "a").write_text("half")
    raise KeyError
  assert folder.parent.exists() == exists and not (exists and written(folder))
  with storage.atomic_folder(folder) as partial:
    (partial / "a").write_text("whole")
    assert not folder.exists() or not written(folder)
  assert written(folder) == ["a"] and written(folder.parent) == ["folder"]


def test_a_folder_that_holds_something_is_refused(tmp_path):
  (tmp_path / "a").write_text("mine")
  for path in (tmp_path, tmp_path / "a"):
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
      with storage.atomic_folder(path):
        pytest.fail("was let in")
  assert written(tmp_path) == ["a"]


def test_files_of_an_existing_folder_are_replaced_together_with_nothing_else(tmp_path):
  (tmp_path / "a").write_text("old")
  (tmp_path / "b").write_text("mine")
  with pytest.raises(KeyError), storage.atomic_files(tmp_path) as partial:
    (partial / "a").write_text("half")
    raise KeyError
  assert (tmp_path / "a").read_text() == "old"
  with storage.atomic_files(tmp_path) as partial:
    (partial / "a").write_text("new")
    (partial / "c").write_text("new")
  assert written(tmp_path) == ["a", "b", "c"]
  assert [(tmp_path / name).read_text() for name in "abc"] == ["new", "mine", "new"]


def test_a_scratch_folder_leaves_nothing_not_even_the_parents_it_made(tmp_path):
  with storage.scratch_folder(tmp_path / "a" / "b") as scratch:
    (scratch / "x").write_text("")
  assert not written(tmp_path)
  with storage.scratch_folder(tmp_path / "a" / "b") as scratch:
    (scratch.parent / "kept").write_text("")
  assert written(tmp_path / "a" / "b") == ["kept"]


def test_what_a_killed_process_left_is_known_by_its_name_and_removed(tmp_path):
  (tmp_path / storage.partial_name()).write_text("")
  (tmp_path / storage.partial_name() / "x").mkdir(parents=True)
  (tmp_path / "mine.partial").write_text("")
  assert [storage.is_partial(name) for name in written(tmp_path)] == [True, True, False]
  storage.remove_partials(tmp_path)
  assert written(tmp_path) == ["mine.partial"]


def test_checking_an_output_folder_leaves_nothing_behind(tmp_path):
  storage.check_output_folder(tmp_path)
  storage.check_output_folder(tmp_path / "a" / "b")
  assert written(tmp_path) == []


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
  for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "broken" / "a"):
    with pytest.raises(ValueError, match="cannot write into .*is not a folder"):
      storage.check_output_folder(path)
  with pytest.raises(ValueError, match="cannot write into"):
    storage.check_output_folder(tmp_path / ("x" * 300))

  def denied(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "mkdir", denied)
  with pytest.raises(ValueError, match="Permission denied"):
    storage.check_output_folder(tmp_path / "new")
