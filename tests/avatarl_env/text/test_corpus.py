"""Tests of avatarl_env/text/corpus.py."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from avatarl_env.text import corpus as corpus_module
from avatarl_env.text.corpus import SPLITS, Corpus, CorpusError, load_corpus

TEXT = "To be, or not to be:\n" * 200
PLAY = "Enter a PLAYER.\n" * 300
PATIENT = corpus_module._PATIENT


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Reply(NamedTuple):
    status: int
    content: bytes
    claimed_length: int | None = None


class Publisher:
    """A web server on this machine that answers with the given replies, in order."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.n_requests = 0
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                publisher.n_requests += 1
                reply = publisher.replies.pop(0)
                self.send_response(reply.status)
                length = reply.claimed_length or len(reply.content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(reply.content)

            def log_message(self, *args: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/input.txt"


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    with publisher.server as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield publisher
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "avatarl_env" / "tinyshakespeare" / "input.txt"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for instead of made."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


@pytest.fixture(autouse=True)
def closed_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher: Publisher, naps: list[float]
) -> None:
    """Publish TEXT as tinyshakespeare here; keep out the user's files, the network and naps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AVATARL_DATA_DIR", raising=False)
    source = corpus_module._Source(publisher.url, sha256(TEXT.encode()))
    monkeypatch.setitem(corpus_module._SOURCES, "tinyshakespeare", source)
    fake = types.ModuleType("avatarl_env.text.playwright")
    play = types.SimpleNamespace(text=PLAY, nats_per_char=0.75)
    fake.write_play = lambda: play  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "avatarl_env.text.playwright", fake)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(name: str | Path) -> str:
    """The message with which a corpus is refused, which must be one line."""
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Splits ------------------------------------------------------------------------------------------


def test_tinyshakespeare_ends_in_a_validation_split_of_111540_characters() -> None:
    lengths = [len(part) for part in Corpus("any", "x" * 1_115_394, "made").splits.values()]
    assert lengths == [948_084, 55_770, 111_540]


@pytest.mark.parametrize("length", range(2000, 2020))
def test_splits_are_the_whole_text_in_order(length: int) -> None:
    text = (TEXT * 2)[:length]
    corpus = Corpus("any", text, "made")
    assert tuple(corpus.splits) == SPLITS == ("train", "surgeon", "validation")
    assert "".join(corpus.splits.values()) == text
    assert [corpus.split(name) for name in SPLITS] == list(corpus.splits.values())


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(
        CorpusError, match="split must be one of train, surgeon, validation, got 'test'"
    ):
        Corpus("any", TEXT, "made").split("test")


def test_require_demands_every_split_to_be_longer() -> None:
    corpus = Corpus("any", "x" * 2000, "made")  # the surgeon's split has 100 characters
    corpus.require(99, "context_length")
    with pytest.raises(CorpusError) as caught:
        corpus.require(100, "context_length")
    assert str(caught.value) == (
        "context_length must be less than 100, the length of the 'surgeon' split of corpus 'any', "
        "got 100"
    )


# Files -------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    content = "caf\u00e9\r\n\ttab\rold \U0001f600\n\n".encode() * 200
    path = write(tmp_path / "my.txt", content)
    corpus = load_corpus(path)
    assert corpus.text.encode() == content
    assert corpus.sha256 == sha256(content)
    assert corpus.source == corpus.name == str(path)
    assert corpus.nats_per_char is None
    assert TEXT[:20] not in repr(corpus)


def test_the_name_of_a_corpus_loads_it_again_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sub" / "my.txt", TEXT.encode())
    first = load_corpus("sub/my.txt")
    monkeypatch.chdir(tmp_path / "sub")
    assert load_corpus(first.name) == first
    assert load_corpus("my.txt") == first
    assert load_corpus("~/sub/my.txt") == first


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "my.txt", b"\xef\xbb\xbf" + TEXT.encode())
    assert load_corpus(path).text == TEXT
    assert load_corpus(path).sha256 == sha256(TEXT.encode())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must be a text, got an empty file"),
        (b"x" * 1999, "must have at least 2000 characters, got 1999"),
        (b"x" * 3000 + b"\0x", "must be UTF-8 text, got a binary file (NUL at byte 3000)"),
        (b"x" * 3000 + b"\xe9x", r"must be UTF-8 text, got b'\xe9' at byte 3000"),
        (b"\xef\xbb\xbf" + b"x" * 3000 + b"\xff", r"must be UTF-8 text, got b'\xff' at byte 3003"),
        ("x\u00e9".encode() * 3000 + b"\xc3", r"must be UTF-8 text, got b'\xc3' at byte 9000"),
    ],
    ids=["empty", "short", "binary", "latin-1", "after the byte order mark", "cut off"],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path / "my.txt", content)
    message = refusal(path)
    assert reason in message
    assert str(path) in message


def test_characters_are_counted_and_not_bytes(tmp_path: Path) -> None:
    assert "got 1999" in refusal(write(tmp_path / "my.txt", "\u00e9".encode() * 1999))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"corpus must be a text file, got the directory {tmp_path}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "corpus must be a regular file" in refusal(tmp_path / "pipe")


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    assert (
        refusal("link")
        == f"corpus file {tmp_path / 'link'} cannot be read: No such file or directory"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("texts/my.txt", "corpus file 'texts/my.txt' must exist, got no such file"),
        ("my.txt", "corpus file 'my.txt' must exist, got no such file"),
        (
            "tinyshakespear",
            "corpus must be one of auto, tinyshakespeare, shakespeare, playwright or the path of "
            "an existing file, got 'tinyshakespear' (did you mean 'tinyshakespeare'?)",
        ),
        (
            "AUTO",
            "corpus must be one of auto, tinyshakespeare, shakespeare, playwright or the path of "
            "an existing file, got 'AUTO' (did you mean 'auto'?)",
        ),
        (
            "",
            "corpus must be one of auto, tinyshakespeare, shakespeare, playwright or the path of "
            "an existing file, got ''",
        ),
    ],
)
def test_a_name_that_is_nothing_is_refused(name: str, message: str) -> None:
    assert refusal(name) == message


@pytest.mark.parametrize("name", [b"auto", 3, None])
def test_a_corpus_is_named_by_a_string_or_a_path(name: object) -> None:
    with pytest.raises(TypeError):
        load_corpus(name)  # type: ignore[arg-type]


# The embedded corpus -----------------------------------------------------------------------------


@pytest.mark.parametrize("file_of_that_name", [False, True])
def test_playwright_is_the_embedded_play(tmp_path: Path, file_of_that_name: bool) -> None:
    if file_of_that_name:
        write(tmp_path / "playwright", TEXT.encode())
    corpus = load_corpus("playwright")
    assert corpus.name == "playwright"
    assert corpus.text == PLAY
    assert corpus.nats_per_char == 0.75
    assert corpus.sha256 == sha256(PLAY.encode())


# Published corpora -------------------------------------------------------------------------------


def test_the_data_folder_comes_first_then_the_cache_then_the_publisher(
    tmp_path: Path, cache: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.replies = [Reply(200, TEXT.encode())]
    published = load_corpus("tinyshakespeare")
    assert published.source == publisher.url
    assert published.name == "tinyshakespeare"
    assert published.text == TEXT
    assert cache.read_bytes() == TEXT.encode()
    assert os.listdir(cache.parent) == ["input.txt"]

    assert load_corpus("tinyshakespeare").source == str(cache)

    by_variable = write(tmp_path / "env" / "tinyshakespeare" / "input.txt", TEXT.encode())
    monkeypatch.setenv("AVATARL_DATA_DIR", str(tmp_path / "env"))
    assert load_corpus("tinyshakespeare").source == str(by_variable)

    by_argument = write(tmp_path / "arg" / "tinyshakespeare" / "input.txt", TEXT.encode())
    assert load_corpus("tinyshakespeare", data_dir=tmp_path / "arg").source == str(by_argument)
    assert load_corpus("tinyshakespeare", data_dir=tmp_path / "empty").source == str(cache)
    assert publisher.n_requests == 1


def test_a_registered_name_wins_over_a_file_of_that_name(tmp_path: Path, cache: Path) -> None:
    write(cache, TEXT.encode())
    write(tmp_path / "tinyshakespeare", PLAY.encode())
    assert load_corpus("tinyshakespeare").text == TEXT
    assert load_corpus("./tinyshakespeare").text == PLAY


def test_a_file_with_the_wrong_checksum_is_never_used(cache: Path, publisher: Publisher) -> None:
    write(cache, PLAY.encode())
    message = refusal("tinyshakespeare")
    for part in (str(cache), sha256(PLAY.encode()), sha256(TEXT.encode())):
        assert part in message
    assert publisher.n_requests == 0


def test_a_download_with_the_wrong_checksum_is_not_kept(cache: Path, publisher: Publisher) -> None:
    publisher.replies = [Reply(200, PLAY.encode())]
    message = refusal("tinyshakespeare")
    for part in (publisher.url, sha256(PLAY.encode()), sha256(TEXT.encode())):
        assert part in message
    assert not cache.parent.exists()


def test_a_busy_publisher_is_asked_again(publisher: Publisher, naps: list[float]) -> None:
    publisher.replies = [Reply(503, b""), Reply(429, b""), Reply(200, TEXT.encode())]
    assert load_corpus("tinyshakespeare").text == TEXT
    assert naps == [1.0, 2.0]


def test_a_download_that_breaks_off_is_tried_again(publisher: Publisher) -> None:
    half = Reply(200, TEXT.encode()[:1000], claimed_length=len(TEXT.encode()))
    publisher.replies = [half, Reply(200, TEXT.encode())]
    assert load_corpus("tinyshakespeare").text == TEXT


def test_a_corpus_asked_for_by_name_never_becomes_another(
    cache: Path, publisher: Publisher, naps: list[float]
) -> None:
    publisher.replies = [Reply(500, b"")] * 3
    message = refusal("tinyshakespeare")
    for part in (publisher.url, "3 attempt(s), HTTPError: 500", "set AVATARL_DATA_DIR=DIR"):
        assert part in message
    assert naps == [1.0, 2.0]
    assert not cache.exists()


def test_a_missing_page_is_not_asked_for_again(publisher: Publisher) -> None:
    publisher.replies = [Reply(404, b"")]
    assert "1 attempt(s), HTTPError: 404" in refusal("tinyshakespeare")


def test_a_download_ends_at_its_time_limit(publisher: Publisher) -> None:
    publisher.replies = [Reply(200, TEXT.encode())]
    with pytest.raises(requests.Timeout, match="not finished after -1 s"):
        corpus_module._fetch(publisher.url, PATIENT._replace(total=-1.0))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, publisher: Publisher) -> None:
    publisher.replies = [Reply(200, TEXT.encode())]
    write(tmp_path / "cache", b"a file where the folder should be")
    message = refusal("tinyshakespeare")
    assert str(tmp_path / "cache") in message
    assert "set XDG_CACHE_HOME" in message


def test_an_interrupted_write_leaves_nothing_behind(
    cache: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    publisher.replies = [Reply(200, TEXT.encode())]
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_corpus("tinyshakespeare")
    assert os.listdir(cache.parent) == []


# auto --------------------------------------------------------------------------------------------


def test_auto_is_tinyshakespeare_where_it_can_be_had(publisher: Publisher) -> None:
    publisher.replies = [Reply(200, TEXT.encode())]
    assert load_corpus().name == "tinyshakespeare"
    assert load_corpus("auto").text == TEXT
    assert publisher.n_requests == 1


def test_auto_falls_back_at_once_with_one_warning(publisher: Publisher, naps: list[float]) -> None:
    publisher.replies = [Reply(503, b"")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_corpus("auto").name == "playwright"
    [warning] = caught
    for part in (publisher.url, "503", "set AVATARL_DATA_DIR=DIR", "'playwright' by name"):
        assert part in str(warning.message)
    assert warning.filename == __file__
    assert publisher.n_requests == 1
    assert naps == []


def test_auto_says_so_when_it_passes_over_a_wrong_file(cache: Path, publisher: Publisher) -> None:
    write(cache, PLAY.encode())
    with pytest.warns(UserWarning, match=f"instead of 'tinyshakespeare': {cache} is not"):
        assert load_corpus("auto").name == "playwright"
    assert publisher.n_requests == 0


# Project Gutenberg -------------------------------------------------------------------------------


def gutenberg_file(body: str, end: str = "*** END OF THE PROJECT GUTENBERG EBOOK X ***") -> bytes:
    lines = [
        "\ufeffLicence\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n\n",
        f"{body}\n\n{end}\nLicence\n",
    ]
    return "".join(lines).replace("\n", "\r\n").encode()


def test_gutenberg_text_stands_between_its_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "THE SONNETS\n\n  *** a line of stars\n" * 100
    write(tmp_path / "shakespeare" / "input.txt", gutenberg_file(body))
    monkeypatch.setattr(corpus_module, "_MIN_GUTENBERG_CHARACTERS", len(body))
    corpus = load_corpus("shakespeare", data_dir=tmp_path)
    assert corpus.text == body
    assert corpus.sha256 == sha256(body.encode())
    monkeypatch.setattr(corpus_module, "_MIN_GUTENBERG_CHARACTERS", len(body) + 1)
    with pytest.raises(CorpusError, match=f"at least {len(body) + 1} characters, got {len(body)}"):
        load_corpus("shakespeare", data_dir=tmp_path)


def test_a_gutenberg_file_without_its_end_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "shakespeare" / "input.txt", gutenberg_file("x" * 3000, end="cut"))
    with pytest.raises(CorpusError, match=r"must hold the '\*\*\* START OF' and '\*\*\* END OF'"):
        load_corpus("shakespeare", data_dir=tmp_path)


# Imports -----------------------------------------------------------------------------------------


def test_importing_the_module_does_not_import_requests() -> None:
    program = "import sys, avatarl_env.text.corpus; sys.exit('requests' in sys.modules)"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


# --- files that are none -------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="this system has no /proc")
@pytest.mark.parametrize("path", ["/proc/self/maps", "/proc/self/mem", "/dev/zero", "/dev/stdin"])
def test_files_of_the_system_are_refused_without_waiting(path: str) -> None:
    with pytest.raises(CorpusError, match=r"empty file|must be a regular file"):
        load_corpus(path)


def test_a_file_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 42)  # takes no room on the disk
    with pytest.raises(CorpusError, match=r"huge\.txt cannot be used: it must have at most"):
        load_corpus(tmp_path / "huge.txt")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    for name in ("x" * 300, "x" * 300 + ".txt", "/" + "y" * 5000):
        with pytest.raises(CorpusError, match=r"^corpus "):
            load_corpus(name)


def test_a_name_that_is_not_text_is_a_name(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(TEXT.encode())
    corpus = load_corpus(os.fsdecode(path))
    assert os.fsencode(corpus.name) == path
    assert load_corpus(corpus.name) == corpus


def test_without_a_home_nothing_is_kept_in_a_folder_of_that_name(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "AVATARL_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"must have a folder to be kept in, .* XDG_CACHE_HOME"):
        load_corpus("tinyshakespeare")
    assert not list(tmp_path.iterdir())
    assert publisher.n_requests == 0
