"""Named corpora: found in a folder, cached, downloaded once, or made on the spot.

`load_corpus` takes a registered name or the path of a UTF-8 text file. The text is never altered:
line ends stay as they are, and only a byte order mark is taken off. (The Project Gutenberg file is
the exception: its licence header and footer and its carriage returns are not part of the plays.)
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import os
import re
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from avatarl_env.files import read_regular, write_atomically
from avatarl_env.memory import memory_limit

SPLITS = ("train", "surgeon", "validation")
"""Which part of a corpus may be used for what: in reading order, 85, 5 and 10 per cent of it."""

_MIN_CHARACTERS = 2000
_MIN_GUTENBERG_CHARACTERS = 4_000_000
_FILE_NAME = "input.txt"
_MEMORY_PER_BYTE = 16  # of a text: code points, token ids, counts


class CorpusError(ValueError):
    """A corpus cannot be had, or cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from.

    Attributes:
        name: What `load_corpus` takes to give this text again: a registered name, or the absolute
            path of a file.
        text: The characters, at least 2,000.
        source: The file, or what else the text was made from.
        nats_per_char: True entropy of the text's source, nats per character, averaged over the
            whole text: about what a model would score that knew the source. Known only for
            `playwright`, otherwise None.
        sha256: Of the text in UTF-8, as hexadecimal digits.
    """

    name: str
    text: str = field(repr=False)
    source: str
    nats_per_char: float | None = None
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        """Check the length and take the checksum."""
        if len(self.text) < _MIN_CHARACTERS:
            raise CorpusError(
                f"corpus {self.name!r} must have at least {_MIN_CHARACTERS} characters, "
                f"got {len(self.text)}"
            )
        object.__setattr__(self, "sha256", hashlib.sha256(self.text.encode()).hexdigest())

    @property
    def splits(self) -> dict[str, str]:
        """The disjoint parts by name, in reading order; together they are the whole text."""
        n = len(self.text)
        cuts = (0, n * 85 // 100, n * 9 // 10, n)
        return {
            name: self.text[begin:end]
            for name, begin, end in zip(SPLITS, cuts[:-1], cuts[1:], strict=True)
        }

    def split(self, name: str) -> str:
        """Return one part of the text.

        Args:
            name: `"train"` (the first 85 %), `"surgeon"` (the next 5 %) or `"validation"`
                (the last 10 %).

        Raises:
            CorpusError: If there is no such part.
        """
        if name not in SPLITS:
            raise CorpusError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        return self.splits[name]

    def require(self, n_chars: int, what: str) -> None:
        """Check that every split is longer than `n_chars` characters.

        Args:
            n_chars: The longest stretch that somebody will cut out of a split, characters.
            what: Name of the argument that asks for it; the error begins with it.

        Raises:
            CorpusError: If a split is not longer.
        """
        shortest = min(self.splits, key=lambda name: len(self.splits[name]))
        length = len(self.splits[shortest])
        if length <= n_chars:
            raise CorpusError(
                f"{what} must be less than {length}, the length of the {shortest!r} split of "
                f"corpus {self.name!r}, got {n_chars}"
            )


class _Source(NamedTuple):
    """Where a named corpus is published.

    `sha256` is None for a Project Gutenberg file: it is revised now and then, and is known by its
    marker lines and its size instead.
    """

    url: str
    sha256: str | None


class _Patience(NamedTuple):
    """How long a download may take: number of attempts, then seconds."""

    attempts: int
    connect: float
    read: float
    total: float


_SOURCES = {
    "tinyshakespeare": _Source(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "shakespeare": _Source(url="https://www.gutenberg.org/cache/epub/100/pg100.txt", sha256=None),
}
_NAMES = ("auto", *_SOURCES, "playwright")
_PATIENT = _Patience(attempts=3, connect=10.0, read=30.0, total=300.0)
_HASTY = _Patience(attempts=1, connect=3.0, read=5.0, total=10.0)
_BACK_OFF_SECONDS = 1.0


def load_corpus(
    name: str | os.PathLike[str] = "auto", *, data_dir: str | os.PathLike[str] | None = None
) -> Corpus:
    """Load a corpus by name or path.

    `tinyshakespeare` and `shakespeare` are looked for in `DATA_DIR/NAME/input.txt`, then in
    the cache `${XDG_CACHE_HOME:-~/.cache}/avatarl_env/NAME/input.txt`, and downloaded into the
    cache if they are in neither.

    Args:
        name: `"tinyshakespeare"`; `"shakespeare"`, the complete works from Project Gutenberg;
            `"playwright"`, the embedded synthetic play; the path of a UTF-8 text file; or
            `"auto"`: tinyshakespeare if it can be had within seconds, else playwright with one
            warning. A registered name wins over a file of the same name.
        data_dir: Folder to look in first; by default what `AVATARL_DATA_DIR` names, if set.

    Returns:
        The corpus, never another one than was asked for by name.

    Raises:
        CorpusError: If there is no such corpus, or it cannot be read, downloaded or verified.
        TypeError: If `name` is neither a string nor a path.
    """
    wanted = os.fspath(name)
    if not isinstance(wanted, str):
        raise TypeError(f"corpus must be a name or a path, got {name!r}")
    if wanted == "auto":
        try:
            return _load_published("tinyshakespeare", data_dir, _HASTY)
        except CorpusError as error:
            warnings.warn(
                f"corpus 'auto' uses the embedded 'playwright' instead of 'tinyshakespeare': "
                f"{error}. To silence this, ask for corpus 'playwright' by name.",
                stacklevel=2,
            )
            return _load_playwright()
    if wanted == "playwright":
        return _load_playwright()
    if wanted in _SOURCES:
        return _load_published(wanted, data_dir, _PATIENT)
    path = os.path.expanduser(wanted)
    if os.path.lexists(path):
        return _load_file(Path(path))
    raise _no_such_corpus(wanted)


def _load_playwright() -> Corpus:
    """Write the embedded play."""
    from avatarl_env.text.playwright import write_play

    play = write_play()
    return Corpus("playwright", play.text, "written by avatarl_env", play.nats_per_char)


def _load_file(path: Path) -> Corpus:
    """Read a user's own text."""
    absolute = path.parent.resolve() / path.name
    return Corpus(str(absolute), _decode(_read(absolute), str(absolute)), str(absolute))


def _load_published(
    name: str, data_dir: str | os.PathLike[str] | None, patience: _Patience
) -> Corpus:
    """Find or download a corpus of `_SOURCES`."""
    folder = data_dir or os.environ.get("AVATARL_DATA_DIR")
    cache_root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cached = Path(cache_root, "avatarl_env", name, _FILE_NAME)
    places = [Path(os.path.expanduser(folder), name, _FILE_NAME)] if folder else []
    for path in (*places, cached):
        if os.path.lexists(path):
            text = _verified_text(_read(path), _SOURCES[name], str(path))
            return Corpus(name, text, str(path.absolute()))
    if cache_root.startswith("~"):  # nobody's home: it would be a folder of that name here
        raise CorpusError(
            f"corpus {name!r} must have a folder to be kept in, {cache_root!r} is none: set "
            f"XDG_CACHE_HOME, or put the file at DIR/{name}/{_FILE_NAME} and set "
            "AVATARL_DATA_DIR=DIR"
        )
    url = _SOURCES[name].url
    content = _download(name, url, patience)
    text = _verified_text(content, _SOURCES[name], url)  # before anything is kept
    _keep(cached, content)
    return Corpus(name, text, url)


def _verified_text(content: bytes, source: _Source, where: str) -> str:
    """Check that `content` is the published corpus; return its text."""
    if source.sha256 is None:
        return _strip_gutenberg(_decode(content, where), where)
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise CorpusError(
            f"{where} is not the published text: its sha256 must be {source.sha256}, got {digest}"
        )
    return _decode(content, where)


def _strip_gutenberg(text: str, where: str) -> str:
    """Return what stands between the lines `*** START OF ...` and `*** END OF ...`."""
    text = text.replace("\r\n", "\n")
    inner = re.search(
        r"^\*\*\* ?START OF [^\n]*\n(.*)^\*\*\* ?END OF ", text, flags=re.MULTILINE | re.DOTALL
    )
    if inner is None:
        raise CorpusError(f"{where} must hold the '*** START OF' and '*** END OF' lines, got none")
    body = inner[1].strip("\n") + "\n"
    if len(body) < _MIN_GUTENBERG_CHARACTERS:
        raise CorpusError(
            f"{where} must have at least {_MIN_GUTENBERG_CHARACTERS} characters, got {len(body)}"
        )
    return body


def _read(path: Path) -> bytes:
    """Read a regular file; a token takes more memory than the byte it comes from."""
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
    """Decode UTF-8 strictly, without its byte order mark and with its line ends as they are."""
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


def _download(name: str, url: str, patience: _Patience) -> bytes:
    """Fetch a URL, again with growing pauses where trying again can help."""
    import requests

    attempt = 1
    while True:
        try:
            return _fetch(url, patience)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            refused = status is not None and 400 <= status < 500 and status != 429
            if refused or attempt == patience.attempts:
                cause = textwrap.shorten(str(error), 100, placeholder=" ...")
                raise CorpusError(
                    f"corpus {name!r} cannot be downloaded from {url} "
                    f"({attempt} attempt(s), {type(error).__name__}: {cause}); put the file at "
                    f"DIR/{name}/{_FILE_NAME} and set AVATARL_DATA_DIR=DIR"
                ) from error
        time.sleep(_BACK_OFF_SECONDS * 2 ** (attempt - 1))
        attempt += 1


def _fetch(url: str, patience: _Patience) -> bytes:
    """Make one request; a trickle of bytes does not extend it beyond `patience.total`."""
    import requests

    deadline = time.monotonic() + patience.total
    timeout = (patience.connect, patience.read)
    chunks = []
    with requests.get(url, timeout=timeout, stream=True) as response:
        response.raise_for_status()
        for chunk in response.iter_content(chunk_size=2**16):
            chunks.append(chunk)
            if time.monotonic() > deadline:
                raise requests.Timeout(f"not finished after {patience.total:g} s")
    return b"".join(chunks)


def _keep(path: Path, content: bytes) -> None:
    """Write a file into the cache so that no reader ever sees a part of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise CorpusError(
            f"cache file {path} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a "
            f"folder that can be"
        ) from error


def _no_such_corpus(name: str) -> CorpusError:
    """Say what `name` could have been."""
    if os.sep in name or "/" in name or Path(name).suffix:
        return CorpusError(f"corpus file {name!r} must exist, got no such file")
    close = difflib.get_close_matches(name.lower(), _NAMES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return CorpusError(
        f"corpus must be one of {', '.join(_NAMES)} or the path of an existing file, "
        f"got {name!r}{hint}"
    )
