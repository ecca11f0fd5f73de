"""The report of a check as Python has it, and the exception of one that does not pass."""

from __future__ import annotations

import re
from html import escape

import msgspec

from gradctl.core.findings import Report


class CheckReport(Report, frozen=True, kw_only=True):
    """The report of a check, true if its verdict is ``pass``.

    ``str`` returns the text of the command line, ``report.machine.json.render`` the JSON; Jupyter shows the HTML.
    """

    @classmethod
    def of(cls, report: Report) -> CheckReport:
        """Return the same report, as Python has it."""
        return cls(**msgspec.structs.asdict(report))

    def __str__(self) -> str:
        from gradctl.report.text import console

        return console.render(self)

    def _repr_html_(self) -> str:
        """Return the HTML report for a notebook, in a frame of its own: neither changes the styles of the other."""
        from gradctl.report.html import page

        style = "width: 100%; height: 40rem; border: 0"
        return f'<iframe title="gradctl report" style="{style}" srcdoc="{escape(page.render(self))}"></iframe>'

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    def raise_if_failed(self) -> None:
        """Raise unless the verdict is ``pass``; a check that is inconclusive, or checked nothing, did not pass.

        Raises:
            CheckFailed: with the report as its message.
        """
        __tracebackhide__ = True
        if not self:
            raise CheckFailed(self)


class CheckFailed(AssertionError):
    """A check did not pass: the verdict in one line, and below it the rest of the report.

    Attributes:
        report: the report.
        summary: the verdict in few words after the rule code, ``GC408 1 of 6 is wrong``.
    """

    def __init__(self, report: CheckReport) -> None:
        from gradctl.report.text.wording import printable, verdict_line

        verdict = printable(verdict_line(report))
        details = str(report).rstrip().removesuffix(verdict).rstrip()  # the report ends with the verdict
        super().__init__(f"{verdict}\n\n{details}".rstrip())
        self.report = report
        parts = re.match(r"(?:FAIL: )?(.*?)(?: \(gradctl explain (\w+)\))?$", verdict)
        text, code = parts.groups("") if parts else (verdict, "")
        self.summary = re.sub(r"(\d+ of \d+) \w+", r"\1", f"{code} {text}".strip(), count=1)

    def __reduce__(self) -> tuple[type[CheckFailed], tuple[CheckReport]]:
        return CheckFailed, (self.report,)


# Where users meet them, and how a traceback names them.
CheckReport.__module__ = CheckFailed.__module__ = "gradctl"
