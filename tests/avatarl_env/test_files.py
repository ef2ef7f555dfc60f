"""Tests of avatarl_env/files.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from avatarl_env.files import dump_json, parse_json, read_json, read_regular, write_atomically


def test_json_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"caf\xc3\xa9": 1}')
    assert read_json(tmp_path / "a.json") == {"caf\u00e9": 1}


@pytest.mark.parametrize("depth", [101, 600, 100_000])
@pytest.mark.parametrize("braces", ["[]", "{}"])
def test_json_that_is_nested_too_deep_is_refused(depth: int, braces: str) -> None:
    opening = braces[0] + ('"a":' if braces == "{}" else "")
    text = opening * depth + "1" + braces[1] * depth
    with pytest.raises(ValueError, match="nested at most 100 deep"):
        parse_json(text)
    shallow = opening * 100 + "1" + braces[1] * 100
    parse_json(shallow)
    parse_json(f"[{', '.join(['[]'] * 500)}]")  # many, but not within one another


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1] 2", b"9" * 5000, b"\0"])
def test_a_file_that_is_not_json_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^file '.*a\.json' must hold JSON: "):
        read_json(tmp_path / "a.json")


def test_paths_that_are_not_utf8_survive_json() -> None:
    path = os.fsdecode(b"caf\xe9/\xf0\x9f\x98\x80/\xed")
    text = dump_json({path: [path]})
    text.encode()  # UTF-8 can hold it
    assert parse_json(text) == {path: [path]}


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_other_kinds_of_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match="it must be a regular file"):
            read_regular(path, 1000)


def test_files_larger_than_the_limit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"four")
    assert read_regular(tmp_path / "text", 4) == b"four"
    with pytest.raises(ValueError, match="at most 3 bytes, got 4"):
        read_regular(tmp_path / "text", 3)
    if Path("/proc/self/maps").exists():  # says that it is empty
        assert read_regular("/proc/self/maps", 1000) == b""


# --- writing -------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)  # a name beside it may not be longer than the system allows
    write_atomically(path, "old")
    write_atomically(path, "n\u00e9w\r\n")
    assert path.read_bytes() == "n\u00e9w\r\n".encode()
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    link = tmp_path / "link"
    link.symlink_to(precious)
    write_atomically(link, "new")
    assert not link.is_symlink()
    assert precious.read_text(encoding="utf-8") == "mine"


def test_a_link_with_the_name_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if an attacker guesses that name."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "guessed")
    (tmp_path / ".guessed.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "page", "new")
    assert not (tmp_path / "precious").exists()
    assert not (tmp_path / "page").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "page"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
