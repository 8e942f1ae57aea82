"""The errors that people see: one line that says where, what was seen, and what to do next."""

from __future__ import annotations


class SwarmmailError(Exception):
    """Anything that ends a task. The text is for people; no traceback is shown unless asked for.

    ``host`` and ``step`` say where, ``what`` what was seen, ``hint`` the next command or action. None of
    them may hold a secret: they are printed and logged as they are.
    """

    exit_code = 1

    def __init__(self, what: str, *, host: str | None = None, step: str | None = None, hint: str | None = None) -> None:
        self.what, self.host, self.step, self.hint = what, host, step, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.host, self.step) if part)
        text = f"{where}: {self.what}" if where else self.what
        return f"{text} -> {self.hint}" if self.hint else text


class InputError(SwarmmailError):
    """The inventory, an argument or a stack file is wrong; nothing was touched.

    ``problems`` holds one line for each problem; all are shown at once.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class HostError(SwarmmailError):
    """A host could not be reached, or a command on it failed."""


class Deadline(HostError):
    """A step took longer than it may. What it had begun may still go on at the host."""


class Unreachable(HostError):
    """No SSH connection: no route, refused, wrong key, or a host key that is not the known one."""


class Locked(SwarmmailError):
    """Another operator is at work."""


class Refused(SwarmmailError):
    """The wanted change would break something; nothing was done."""
