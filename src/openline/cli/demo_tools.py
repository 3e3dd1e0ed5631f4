"""The demo's tools: small, real work on log files in a folder of their own.

They are made to suit any model, a script too: whatever arguments come, the answer is
a text, and no path leads out of the folder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

OUTPUT_CHARACTERS_MAX: Final = 4000  # what a coding agent lets one tool call say
_CONTENT_CHARACTERS_MAX: Final = 65_536
_FILES_MAX: Final = 1000
_LINES: Final = 400  # a log file of about 24 KB
_SERVICES: Final = ("api", "billing", "gateway", "search", "worker")
_LOGS: Final = [f"{service}.log" for service in _SERVICES]
_WORDS: Final = ["ERROR", "timeout", "retried"]
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}\Z")

INSTRUCTIONS: Final = (
    "You are an agent that works on a folder of text files with the tools you are given. Look before you conclude, "
    "quote what you found, and keep your answers short."
)
TASK: Final = (
    "The folder holds the logs of five services. Find out which one fails most and why, using the tools one call at a "
    "time. Write what you found to report.txt, then answer in two sentences."
)


def _tool(name: str, description: str, /, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "name": name, "description": description, "parameters": parameters, "strict": True}


_LOG: Final[dict[str, Any]] = {"type": "string", "enum": _LOGS, "description": "A log file."}

TOOLS: Final[list[dict[str, Any]]] = [
    _tool(
        "search_files",
        "Every line of the logs that holds a word, as file:line: text.",
        word={"type": "string", "enum": _WORDS, "description": "What to look for."},
    ),
    _tool(
        "read_file",
        f"One page of a log file, {OUTPUT_CHARACTERS_MAX} characters at most.",
        name=_LOG,
        page={"type": "integer", "minimum": 1, "maximum": 6, "description": "Which page."},
    ),
    _tool("count_words", "How often each word stands in a log file, most frequent first.", name=_LOG),
    _tool(
        "write_file",
        "Write a text file, replacing what was there.",
        name={"type": "string", "description": "A plain file name."},
        content={"type": "string", "description": "Its whole text."},
    ),
]


class Refused(Exception):  # noqa: N818 - an answer to the model, not a fault of ours
    """Arguments that no tool can work with; the model is told why."""


class _Search(msgspec.Struct):
    word: str

    def run(self, folder: Path) -> str:
        found = [
            f"{path.name}:{number}: {line}"
            for path in sorted(folder.iterdir())
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if self.word in line
        ]
        return _cut(found) if found else f"No line holds '{self.word}'."


class _Read(msgspec.Struct):
    name: str
    page: int = 1

    def run(self, folder: Path) -> str:
        text = _existing(folder, self.name).read_text(encoding="utf-8")
        size = OUTPUT_CHARACTERS_MAX - 80  # room for the heading
        pages = max(1, -(-len(text) // size))
        page = min(max(self.page, 1), pages)
        return f"{self.name}, page {page} of {pages}:\n{text[(page - 1) * size : page * size]}"


class _Count(msgspec.Struct):
    name: str

    def run(self, folder: Path) -> str:
        words = re.findall(r"[\w-]+", _existing(folder, self.name).read_text(encoding="utf-8"))
        return _cut([f"{count:6} {word}" for word, count in Counter(words).most_common(150)])


class _Write(msgspec.Struct):
    name: str
    content: str

    def run(self, folder: Path) -> str:
        if len(self.content) > _CONTENT_CHARACTERS_MAX:
            raise Refused(f"'content' has {len(self.content)} characters: {_CONTENT_CHARACTERS_MAX} at most.")
        if len(list(folder.iterdir())) >= _FILES_MAX:
            raise Refused(f"The folder is full: {_FILES_MAX} files at most.")
        _path(folder, self.name).write_text(self.content, encoding="utf-8")
        files = "\n".join(f"{path.stat().st_size:8} {path.name}" for path in sorted(folder.iterdir()))
        return f"Wrote {len(self.content)} characters to {self.name}. The folder now:\n{files}"


_Call = _Search | _Read | _Count | _Write
_CALLS: Final[dict[str, type[_Call]]] = {
    "search_files": _Search,
    "read_file": _Read,
    "count_words": _Count,
    "write_file": _Write,
}


def toolbox(folder: Path) -> Callable[[str, str], str]:
    """The tools over a new folder of logs, the same in every run.

    Returns:
        What a tool says to a call: from its name and its arguments, as the model wrote them. It never raises on them.
    """
    folder.mkdir()
    for service in _SERVICES:
        (folder / f"{service}.log").write_text(_log_of(service), encoding="utf-8")
    return lambda name, arguments: _answer(folder, name, arguments)


def _answer(folder: Path, name: str, arguments: str) -> str:
    try:
        if name not in _CALLS:
            raise Refused(f"There is no tool '{name}': expected {', '.join(_CALLS)}.")
        return msgspec.json.decode(arguments, type=_CALLS[name]).run(folder)[:OUTPUT_CHARACTERS_MAX]
    except (Refused, msgspec.DecodeError, OSError) as error:
        return f"Error: {error}"


def _path(folder: Path, name: str) -> Path:
    # A model's own words: nothing but a plain name may reach the file system.
    if not _PLAIN_NAME.match(name):
        raise Refused("'name' must be a plain file name: letters, digits, '.', '_' and '-', 64 at most.")
    return folder / name


def _existing(folder: Path, name: str) -> Path:
    path = _path(folder, name)
    if not path.is_file():
        raise Refused(f"There is no file '{name}': there are {', '.join(_LOGS)}.")
    return path


def _cut(lines: list[str]) -> str:
    """As many whole lines as a tool may say, and how many more there are."""
    kept: list[str] = []
    size = OUTPUT_CHARACTERS_MAX - 40  # room for the last line
    for line in lines:
        size -= len(line) + 1
        if size < 0:
            return "\n".join([*kept, f"… and {len(lines) - len(kept)} lines more"])
        kept.append(line)
    return "\n".join(kept)


def _log_of(service: str) -> str:
    weight = _SERVICES.index(service) + 2
    return "".join(f"{_log_line(service, weight, number)}\n" for number in range(_LINES))


def _log_line(service: str, weight: int, number: int) -> str:
    time = f"2026-01-12T{8 + number // 60:02}:{number % 60:02}:{number * 7 % 60:02}Z"
    mark = number * 31 + weight * 17
    if mark % 97 < weight:
        return f"{time} ERROR {service} request {mark} failed: timeout after {1000 + mark % 900} ms"
    if mark % 23 < weight:
        return f"{time} WARN {service} request {mark} retried, attempt {mark % 3 + 2}"
    return f"{time} INFO {service} request {mark} took {mark % 89 + 3} ms"
