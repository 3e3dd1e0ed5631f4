"""What was found of an upstream, as a table."""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from openline.cli.checks import Finding, Report

_MARKS: Final = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red")}


def table(report: Report) -> Group:
    """What was found by trying turns too, under its title and with the sum of it."""
    where = f" at {report.url}" if report.url not in {"", report.upstream} else ""
    title = Text.assemble((report.upstream, "bold"), where, f", model {report.tried}" if report.tried else "")
    wrong = sum(finding.level == "bad" for finding in report.findings)
    odd = sum(finding.level == "warn" for finding in report.findings)
    return Group(Text(), title, rows(report), Text(_sum_of(wrong, odd), "red" if wrong else "green"))


def rows(report: Report) -> Table:
    """A row for each finding; a remedy stands under what it is for."""
    drawn = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, padding=(0, 1))
    drawn.add_column(width=1)
    drawn.add_column(no_wrap=True, style="bold")
    drawn.add_column(ratio=1)
    for finding in report.findings:
        mark, style = _MARKS[finding.level]
        drawn.add_row(Text(mark, style), finding.check, _words(finding))
    return drawn


def _words(finding: Finding) -> Text:
    words = Text(finding.says)
    if finding.remedy:
        words.append(f"\n→ {finding.remedy}", "dim" if finding.level == "ok" else "cyan")
    return words


def _sum_of(wrong: int, odd: int) -> str:
    if wrong:
        return f"Turns will fail: {wrong} found that must be set right."
    return f"Turns work; {odd} worth knowing." if odd else "Everything works."
