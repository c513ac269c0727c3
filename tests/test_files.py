"""A file is written whole or not at all, and its writers leave nothing else behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchkd.files import replacing, write_atomically


def test_a_file_is_written_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.yaml"
    write_atomically(path, "\u00e9\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_atomically(path, "again")
    assert path.read_text() == "again"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "as it was"], ids=["new", "there already"])
def test_a_write_that_fails_changes_nothing_and_leaves_nothing(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "log"
    if before is not None:
        path.write_text(before)

    def write_half() -> None:
        with replacing(path) as partial:
            partial.write_text("half of it")
            assert not path.exists() if before is None else path.read_text() == before
            raise RuntimeError("the pen broke")

    with pytest.raises(RuntimeError, match="the pen broke"):
        write_half()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == (
        [] if before is None else [("log", before)]
    )


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_text("as it was")

    def no_room(descriptor: int) -> None:
        raise OSError("no space left on device")

    # What is still in memory when the write returns can fail to reach the disk.
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "too much")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("log", "as it was")]


def test_two_writers_of_one_path_have_temporary_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert (first.read_text(), second.read_text()) == ("first", "second")
    # The outer block ends last.
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_never_mix_their_text(tmp_path: Path) -> None:
    path, letters = tmp_path / "log", ("a", "b")
    code = "import sys; from pathlib import Path; from switchkd.files import write_atomically\n"
    code += "for _ in range(50): write_atomically(Path(sys.argv[1]), sys.argv[2] * 100_000)"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in letters]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen | {path.read_text()} <= {letter * 100_000 for letter in letters}
    assert list(tmp_path.iterdir()) == [path]
