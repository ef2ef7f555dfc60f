"""Tests of avatarl_env/text/corpus.py."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from avatarl_env.text.corpus import (
    CORPORA,
    SPLITS,
    Corpus,
    CorpusError,
    Published,
    gutenberg_text,
    load_corpus,
)

TEXT = "To be, or not to be:\n" * 200
PLAY = "Enter a PLAYER.\n" * 300
GUTENBERG = (
    "\ufeffLicence\r\n*** START OF IT ***\r\n\r\nA play.\r\n\r\n*** END OF IT ***\r\nLicence\r\n"
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Reply(NamedTuple):
    status: int
    content: bytes = b""
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
    """Record pauses instead of sleeping."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


@pytest.fixture(autouse=True)
def isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher: Publisher, naps: list[float]
) -> None:
    """Publish TEXT as tinyshakespeare locally; block the user's files, the network and pauses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AVATARL_DATA_DIR", raising=False)
    published = Published(publisher.url, sha256(TEXT.encode()))
    monkeypatch.setitem(CORPORA, "tinyshakespeare", published)
    play = Corpus("playwright", PLAY, "made here", 0.75)
    monkeypatch.setitem(CORPORA, "playwright", lambda: play)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(name: str | Path) -> str:
    """Return the message of a refused corpus, which must be one line."""
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2000, 2001, 2009, 2019])
def test_splits_are_the_whole_text_in_order(length: int) -> None:
    text = (TEXT * 2)[:length]
    corpus = Corpus("any", text, "made")
    assert tuple(corpus.splits) == SPLITS == ("train", "surgeon", "validation")
    assert "".join(corpus.split(name) for name in SPLITS) == text
    with pytest.raises(CorpusError, match="train, surgeon, validation, got 'test'"):
        corpus.split("test")


def test_require_demands_every_split_to_be_longer() -> None:
    corpus = Corpus("any", "x" * 2000, "made")  # the surgeon's split has 100 characters
    corpus.require(99, "context_length")
    with pytest.raises(CorpusError, match=r"^context_length .* 100, .*'surgeon'.*'any', got 100$"):
        corpus.require(100, "context_length")


# --- files ---------------------------------------------------------------------------------------


def test_a_file_is_read_exactly_without_its_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "caf\u00e9\r\n\ttab\rold \U0001f600\n\n".encode() * 200
    path = write(tmp_path / "sub" / "my.txt", b"\xef\xbb\xbf" + content)
    corpus = load_corpus(path)
    assert corpus.text.encode() == content
    assert corpus.sha256 == sha256(content)
    assert corpus.source == corpus.name == str(path)
    assert corpus.nats_per_char is None
    assert "caf" not in repr(corpus)
    monkeypatch.chdir(tmp_path / "sub")
    for name in (corpus.name, "my.txt", "~/sub/my.txt"):
        assert load_corpus(name) == corpus


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "got an empty file"),
        ("\u00e9".encode() * 1999, "at least 2000 characters, got 1999"),  # not bytes
        (b"x" * 3000 + b"\0x", "got a binary file (NUL at byte 3000)"),
        (b"x" * 3000 + b"\xe9x", r"got b'\xe9' at byte 3000"),
        (b"\xef\xbb\xbf" + b"x" * 3000 + b"\xff", r"got b'\xff' at byte 3003"),
        ("x\u00e9".encode() * 3000 + b"\xc3", r"got b'\xc3' at byte 9000"),
    ],
    ids=["empty", "short", "binary", "latin-1", "after the byte order mark", "cut off"],
)
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path / "my.txt", content)
    assert reason in (message := refusal(path))
    assert str(path) in message


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)  # takes no room on the disk


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "must be a text file, got the directory"),
        (lambda path: path.symlink_to("nothing"), "cannot be read: No such file"),
        (huge, "cannot be used: it must have at most"),
        pytest.param(
            os.mkfifo,
            "must be a regular file",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here"),
        ),
        pytest.param(
            lambda path: path.symlink_to("/dev/zero"),
            "must be a regular file",
            marks=pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no devices here"),
        ),
    ],
    ids=["directory", "link to nothing", "huge", "pipe", "device"],
)
def test_other_kinds_of_files_are_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / "it.txt")
    assert reason in refusal("it.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("texts/my.txt", "corpus file 'texts/my.txt' must exist"),
        ("my.txt", "corpus file 'my.txt' must exist"),
        ("tinyshakespear", "shakespeare, playwright or .*, got .*did you mean 'tinyshakespeare'"),
        ("AUTO", "got 'AUTO'.*did you mean 'auto'"),
        ("", "corpus must be one of auto, tinyshakespeare, .* got ''"),
        ("x" * 300, "corpus must be one of"),
        ("/" + "y" * 5000, "corpus file"),
    ],
)
def test_an_unknown_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load_corpus(name)


# --- named corpora -------------------------------------------------------------------------------


def test_a_name_wins_over_a_file_of_that_name(tmp_path: Path, cache: Path) -> None:
    write(cache, TEXT.encode())
    for name in ("tinyshakespeare", "playwright"):
        write(tmp_path / name, b"?" * 3000)
    assert load_corpus("tinyshakespeare").text == TEXT
    assert load_corpus("playwright").text == PLAY
    assert load_corpus("./tinyshakespeare").text == "?" * 3000


def test_the_data_folder_comes_first_then_the_cache_then_the_publisher(
    tmp_path: Path, cache: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.replies = [Reply(200, TEXT.encode())]
    published = load_corpus("tinyshakespeare")
    assert (published.source, published.name) == (publisher.url, "tinyshakespeare")
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


def test_a_file_with_the_wrong_checksum_is_never_used_or_kept(
    cache: Path, publisher: Publisher
) -> None:
    publisher.replies = [Reply(200, PLAY.encode())]
    digests = (sha256(PLAY.encode()), sha256(TEXT.encode()))
    message = refusal("tinyshakespeare")
    assert all(part in message for part in (publisher.url, *digests))
    assert not cache.parent.exists()
    write(cache, PLAY.encode())
    message = refusal("tinyshakespeare")
    assert all(part in message for part in (str(cache), *digests))
    assert publisher.n_requests == 1


@pytest.mark.parametrize(
    ("replies", "pauses"),
    [
        ([Reply(503), Reply(429), Reply(200, TEXT.encode())], [1.0, 2.0]),
        # one that breaks off
        ([Reply(200, TEXT.encode()[:9], len(TEXT)), Reply(200, TEXT.encode())], [1.0]),
    ],
)
def test_a_failed_download_is_retried(
    replies: list[Reply], pauses: list[float], publisher: Publisher, naps: list[float]
) -> None:
    publisher.replies = replies
    assert load_corpus("tinyshakespeare").text == TEXT
    assert naps == pauses


@pytest.mark.parametrize(
    ("replies", "reason"),
    [([Reply(500)] * 3, "3 attempt(s), HTTPError: 500"), ([Reply(404)], "1 attempt(s), HTTPError")],
)
def test_a_corpus_requested_by_name_has_no_fallback(
    replies: list[Reply], reason: str, cache: Path, publisher: Publisher
) -> None:
    publisher.replies = replies
    message = refusal("tinyshakespeare")
    assert all(part in message for part in (publisher.url, reason, "set AVATARL_DATA_DIR=DIR"))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, publisher: Publisher) -> None:
    publisher.replies = [Reply(200, TEXT.encode())]
    write(tmp_path / "cache", b"a file where the folder should be")
    message = refusal("tinyshakespeare")
    assert str(tmp_path / "cache") in message
    assert "set XDG_CACHE_HOME" in message


# --- auto ----------------------------------------------------------------------------------------


def test_auto_falls_back_at_once_with_one_warning(
    publisher: Publisher, naps: list[float], cache: Path
) -> None:
    publisher.replies = [Reply(503)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_corpus("auto").name == "playwright"
    [warning] = caught
    for part in (publisher.url, "503", "set AVATARL_DATA_DIR=DIR", "'playwright' by name"):
        assert part in str(warning.message)
    assert warning.filename == __file__
    assert (publisher.n_requests, naps) == (1, [])
    write(cache, PLAY.encode())  # a wrong file
    with pytest.warns(UserWarning, match=f"instead of 'tinyshakespeare': {cache} is not"):
        load_corpus("auto")


# --- adding a corpus -----------------------------------------------------------------------------


def test_a_corpus_is_added_by_one_entry(
    tmp_path: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CORPORA, "made", lambda: Corpus("made", PLAY, "made here"))
    assert load_corpus("made").text == PLAY
    row = Published(publisher.url, extract=gutenberg_text, min_characters=8)
    monkeypatch.setitem(CORPORA, "book", row)
    path = write(tmp_path / "data" / "book" / "input.txt", GUTENBERG.encode())
    monkeypatch.setenv("AVATARL_DATA_DIR", str(tmp_path / "data"))
    assert "2000 characters, got 8" in refusal("book")
    monkeypatch.setitem(CORPORA, "book", row._replace(min_characters=9))
    assert f"{path} must have at least 9 characters, got 8" in refusal("book")
    write(path, GUTENBERG.replace("END", "STOP").encode())
    assert f"{path} must have the '*** START OF' and '*** END OF' lines" in refusal("book")
    write(path, GUTENBERG.replace("A play.", "A play." * 300).encode())
    assert load_corpus("book").text == "A play." * 300 + "\n"
