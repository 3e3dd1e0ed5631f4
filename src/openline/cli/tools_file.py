"""Tools out of a Python file: which of its functions a model may call."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec

from openline.client.tools import is_noted


class ToolsFileError(Exception):
    """A file of tools cannot be used; the message names it, the line and what was expected."""


class ToolsFile(msgspec.Struct, frozen=True):
    """What a file offers.

    Attributes:
        tools: its `TOOLS`; else its functions with `@openline.tool`; else all its public functions.
        on_unknown: its function of that name, which decides about calls of which nobody knows how they ended.
    """

    path: Path
    tools: Sequence[Callable[..., Any] | dict[str, Any]]
    on_unknown: Callable[..., Any] | None = None


def read_tools_file(path: Path) -> ToolsFile:
    """Run the file, and see what is in it.

    Raises:
        ToolsFileError: it cannot be run, or has no tools.
    """
    module = _run(path)
    on_unknown = getattr(module, "on_unknown", None)
    listed = getattr(module, "TOOLS", None)
    if listed is not None:
        if not isinstance(listed, list | tuple):
            raise ToolsFileError(f"--tools {path}: TOOLS is a {type(listed).__name__}: expected a list of functions.")
        tools = cast("Sequence[Any]", listed)
    else:
        own = [
            function
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__ == module.__name__ and not name.startswith("_") and function is not on_unknown
        ]
        own.sort(key=lambda function: function.__code__.co_firstlineno)
        tools = [function for function in own if is_noted(function)] or own
    if not tools:
        raise ToolsFileError(
            f"--tools {path}: it has no functions: expected some, such as `def read_file(path: str) -> str`."
        )
    return ToolsFile(path, tools, on_unknown)


def _run(path: Path) -> ModuleType:
    name = f"openline_tools_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ToolsFileError(f"--tools {path}: expected a Python file, whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its functions' types are looked up
    sys.path.insert(0, str(path.parent.absolute()))  # for what stands beside it
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        if error.filename == str(path.absolute()) or not path.exists():
            raise ToolsFileError(f"--tools {path}: there is no such file.") from None
        raise ToolsFileError(_where(path, error)) from None
    except Exception as error:  # noqa: BLE001 - whatever the file does
        raise ToolsFileError(_where(path, error)) from None
    return module


def _where(path: Path, error: Exception) -> str:
    """What went wrong in the file, and on which of its lines."""
    if isinstance(error, SyntaxError):
        return f"--tools {path}, line {error.lineno}: {error.msg}."
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())]
    line = f", line {own[-1].lineno}" if own else ""
    return f"--tools {path}{line}: {type(error).__name__}: {error}"
