"""Named corpora: read from a folder or a cache, downloaded once, or generated.

`load_corpus` takes a name in `CORPORA` or the path of a UTF-8 text file. To add a corpus, add a row
to `CORPORA`, here or from outside the package:

    CORPORA["mine"] = Published("https://example.org/mine.txt", sha256="...")

The text is not changed: line ends are kept, and only a byte order mark is removed. (A Project
Gutenberg file is the exception: its licence and its carriage returns are not part of the text.)
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from avatarl_env.errors import closest
from avatarl_env.files import read_regular, write_atomically
from avatarl_env.memory import memory_limit

SPLITS = ("train", "surgeon", "validation")
"""The parts of a corpus in reading order: 85, 5 and 10 per cent of it."""

MIN_CHARACTERS = 2000
_FILE_NAME = "input.txt"
_MEMORY_PER_BYTE = 16  # of a text: code points, token ids, counts
_BACK_OFF_SECONDS = 1.0


class CorpusError(ValueError):
    """A corpus that is missing or unusable; the message is one line."""


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from.

    Raises:
        CorpusError: if the text has fewer than 2,000 characters.
    """

    name: str
    """Name or absolute path from which `load_corpus` loads this text again."""
    text: str = field(repr=False)
    """The characters, at least 2,000."""
    source: str
    """The file or URL, or how the text was made."""
    nats_per_char: float | None = None
    """Entropy of the process that generated the text, nats per character, which is about the loss
    of a model that knows the process. None if unknown, as for all corpora but `playwright`."""
    sha256: str = field(init=False)
    """Hexadecimal checksum of the text in UTF-8."""

    def __post_init__(self) -> None:
        """Check the length and compute the checksum."""
        if len(self.text) < MIN_CHARACTERS:
            raise CorpusError(
                f"corpus {self.name!r} must have at least {MIN_CHARACTERS} characters, "
                f"got {len(self.text)}"
            )
        object.__setattr__(self, "sha256", hashlib.sha256(self.text.encode()).hexdigest())

    @property
    def splits(self) -> dict[str, str]:
        """The disjoint parts by name, in reading order, which together are the whole text."""
        n = len(self.text)
        cuts = (0, n * 85 // 100, n * 9 // 10, n)
        return {name: self.text[cuts[i] : cuts[i + 1]] for i, name in enumerate(SPLITS)}

    def split(self, name: str) -> str:
        """Return one part of the text.

        Args:
            name: `"train"` (the first 85 %), `"surgeon"` (the next 5 %) or `"validation"`
                (the last 10 %).

        Raises:
            CorpusError: if there is no such part.
        """
        if name not in SPLITS:
            raise CorpusError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        return self.splits[name]

    def require(self, n_chars: int, what: str) -> None:
        """Check that every split is longer than `n_chars` characters.

        Args:
            n_chars: longest window that will be cut out of a split, characters.
            what: name of the argument, for the message.

        Raises:
            CorpusError: if a split is not longer.
        """
        lengths = {name: len(part) for name, part in self.splits.items()}
        shortest = min(SPLITS, key=lengths.__getitem__)
        if lengths[shortest] <= n_chars:
            raise CorpusError(
                f"{what} must be less than {lengths[shortest]}, the length of the {shortest!r} "
                f"split of corpus {self.name!r}, got {n_chars}"
            )


class Published(NamedTuple):
    """A text that can be downloaded, and how to verify it."""

    url: str
    sha256: str | None = None
    """Hexadecimal checksum of the file; None for a file that its publisher revises."""
    extract: Callable[[str], str] = str
    """Returns the corpus within the file's text, or raises a ValueError: "must ..."."""
    min_characters: int = MIN_CHARACTERS
    """Least length of the corpus."""


class _Limits(NamedTuple):
    """How long a download may take: number of attempts, then seconds."""

    attempts: int
    connect: float
    read: float
    total: float


_LIMITS = _Limits(attempts=3, connect=10.0, read=30.0, total=300.0)
_SHORT_LIMITS = _Limits(attempts=1, connect=3.0, read=5.0, total=10.0)


def gutenberg_text(text: str) -> str:
    """Return the text between the lines `*** START OF ...` and `*** END OF ...`.

    Raises:
        ValueError: if there are no such lines.
    """
    pattern = r"^\*\*\* ?START OF [^\n]*\n(.*)^\*\*\* ?END OF "
    inner = re.search(pattern, text.replace("\r\n", "\n"), flags=re.MULTILINE | re.DOTALL)
    if inner is None:
        raise ValueError("must have the '*** START OF' and '*** END OF' lines, got none")
    return inner[1].strip("\n") + "\n"


def _playwright() -> Corpus:
    from avatarl_env.text.playwright import write_play

    play = write_play()
    return Corpus("playwright", play.text, "written by avatarl_env", play.nats_per_char)


CORPORA: dict[str, Published | Callable[[], Corpus]] = {
    "tinyshakespeare": Published(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "shakespeare": Published(
        "https://www.gutenberg.org/cache/epub/100/pg100.txt",
        extract=gutenberg_text,
        min_characters=4_000_000,
    ),
    "playwright": _playwright,
}
"""The corpora by name: a text to download, or a function that returns a `Corpus`."""


def load_corpus(
    name: str | os.PathLike[str] = "auto", *, data_dir: str | os.PathLike[str] | None = None
) -> Corpus:
    """Load a corpus by name or path.

    `tinyshakespeare` and `shakespeare` are looked for in `DATA_DIR/NAME/input.txt`, then in the
    cache `${XDG_CACHE_HOME:-~/.cache}/avatarl_env/NAME/input.txt`, and downloaded into the cache if
    they are in neither.

    Args:
        name: `"tinyshakespeare"`; `"shakespeare"`, the complete works from Project Gutenberg;
            `"playwright"`, the embedded synthetic play; the path of a UTF-8 text file; or
            `"auto"`: tinyshakespeare if it is available within seconds, else playwright with one
            warning. A name in `CORPORA` takes precedence over a file of the same name.
        data_dir: folder to look in first; default `$AVATARL_DATA_DIR`, if set.

    Raises:
        CorpusError: if there is no such corpus, or it cannot be read, downloaded or verified.
        TypeError: if `name` is neither a string nor a path.
    """
    wanted = os.fspath(name)
    if not isinstance(wanted, str):
        raise TypeError(f"corpus must be a name or a path, got {name!r}")
    if wanted == "auto":
        try:
            return _load_named("tinyshakespeare", data_dir, _SHORT_LIMITS)
        except CorpusError as error:
            warnings.warn(
                f"corpus 'auto' uses the embedded 'playwright' instead of 'tinyshakespeare': "
                f"{error}. To silence this, ask for corpus 'playwright' by name.",
                stacklevel=2,
            )
            wanted = "playwright"
    if wanted in CORPORA:
        return _load_named(wanted, data_dir, _LIMITS)
    expanded = os.path.expanduser(wanted)
    if not os.path.lexists(expanded):
        raise _no_such_corpus(wanted)
    path = Path(expanded)
    absolute = path.parent.resolve() / path.name
    return Corpus(str(absolute), _decode(_read(absolute), str(absolute)), str(absolute))


def _load_named(name: str, data_dir: str | os.PathLike[str] | None, limits: _Limits) -> Corpus:
    """Generate, find or download a corpus of `CORPORA`."""
    source = CORPORA[name]
    if not isinstance(source, Published):
        return source()
    folder = data_dir or os.environ.get("AVATARL_DATA_DIR")
    cache_root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cached = Path(cache_root, "avatarl_env", name, _FILE_NAME)
    places = [Path(os.path.expanduser(folder), name, _FILE_NAME)] if folder else []
    for path in (*places, cached):
        if os.path.lexists(path):
            return Corpus(
                name, _verified_text(_read(path), source, str(path)), str(path.absolute())
            )
    if cache_root.startswith("~"):  # no home folder is known
        raise CorpusError(
            f"corpus {name!r} must have a folder for the cache, got {cache_root!r}: set "
            f"XDG_CACHE_HOME, or put the file at DIR/{name}/{_FILE_NAME} and set "
            "AVATARL_DATA_DIR=DIR"
        )
    content = _download(name, source.url, limits)
    text = _verified_text(content, source, source.url)  # before it is cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, content)
    except OSError as error:
        raise CorpusError(
            f"cache file {cached} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a "
            "writable folder"
        ) from error
    return Corpus(name, text, source.url)


def _verified_text(content: bytes, source: Published, where: str) -> str:
    """Check that `content` is the published file; return the corpus in it."""
    digest = hashlib.sha256(content).hexdigest()
    if source.sha256 not in (None, digest):
        raise CorpusError(
            f"{where} is not the published text: its sha256 must be {source.sha256}, got {digest}"
        )
    try:
        text = source.extract(_decode(content, where))
    except CorpusError:
        raise
    except ValueError as error:
        raise CorpusError(f"{where} {error}") from error
    if len(text) < source.min_characters:
        raise CorpusError(
            f"{where} must have at least {source.min_characters} characters, got {len(text)}"
        )
    return text


def _read(path: Path) -> bytes:
    """Read a regular file that fits in memory."""
    if os.path.isdir(path):
        raise CorpusError(f"corpus must be a text file, got the directory {path}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise CorpusError(f"corpus must be a regular file, got {path}")
    try:
        return read_regular(path, memory_limit() // _MEMORY_PER_BYTE)
    except OSError as error:
        raise CorpusError(f"corpus file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorpusError(f"corpus file {path} cannot be used: {error}") from error


def _decode(content: bytes, where: str) -> str:
    """Decode UTF-8 strictly; drop a byte order mark, keep line ends."""
    if not content:
        raise CorpusError(f"{where} must be a text, got an empty file")
    if (offset := content.find(b"\0")) >= 0:
        raise CorpusError(f"{where} must be UTF-8 text, got a binary file (NUL at byte {offset})")
    body = content.removeprefix(codecs.BOM_UTF8)
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        offset = len(content) - len(body) + error.start
        raise CorpusError(
            f"{where} must be UTF-8 text, got {content[offset : offset + 1]!r} at byte {offset}"
        ) from error


def _download(name: str, url: str, limits: _Limits) -> bytes:
    """Download a URL; retry with growing pauses unless the server refuses it."""
    import requests

    attempt = 1
    while True:
        try:
            return _fetch(url, limits)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            refused = status is not None and 400 <= status < 500 and status != 429
            if refused or attempt == limits.attempts:
                cause = textwrap.shorten(str(error), 100, placeholder=" ...")
                raise CorpusError(
                    f"corpus {name!r} cannot be downloaded from {url} "
                    f"({attempt} attempt(s), {type(error).__name__}: {cause}); put the file at "
                    f"DIR/{name}/{_FILE_NAME} and set AVATARL_DATA_DIR=DIR"
                ) from error
        time.sleep(_BACK_OFF_SECONDS * 2 ** (attempt - 1))
        attempt += 1


def _fetch(url: str, limits: _Limits) -> bytes:
    """Make one request; stop after `limits.total` even if bytes still arrive."""
    import requests

    deadline = time.monotonic() + limits.total
    timeout = (limits.connect, limits.read)
    chunks = []
    with requests.get(url, timeout=timeout, stream=True) as response:
        response.raise_for_status()
        for chunk in response.iter_content(chunk_size=2**16):
            chunks.append(chunk)
            if time.monotonic() > deadline:
                raise requests.Timeout(f"not finished after {limits.total:g} s")
    return b"".join(chunks)


def _no_such_corpus(name: str) -> CorpusError:
    if os.sep in name or "/" in name or Path(name).suffix:
        return CorpusError(f"corpus file {name!r} must exist, got no such file")
    names = ("auto", *CORPORA)
    return CorpusError(
        f"corpus must be one of {', '.join(names)} or the path of an existing file, "
        f"got {name!r}{closest(name.lower(), names)}"
    )
