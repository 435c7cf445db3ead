"""What every command says alike: exit codes, one-line errors, printable names, times, choices."""

from __future__ import annotations

# Exit codes: all done; some inputs failed or the run broke off; wrong usage; backend not available.
OK, SOME_FAILED, USAGE, NO_BACKEND = range(4)

# Names of the backends, as `backends.BACKENDS` describes them; --help must not import that.
BACKENDS = ("xla", "numpy", "onnxruntime", "onnxruntime-cuda", "tensorrt")


class CommandError(Exception):
    """Ends a command with an exit code; the message is one line: what, why, and the cure."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def printable(text: str, keep: str = "") -> str:
    """Text that a terminal shows on one line: control characters and surrogates escaped."""
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def brief(error: BaseException) -> str:
    """An exception's class and the first line of its message, or else where it was raised."""
    name, text = type(error).__name__, str(error).strip()
    if text:
        return f"{name}: {text}".splitlines()[0].rstrip(": ")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return name
    file = trace.tb_frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{name} in {file}, line {trace.tb_lineno}"


def clock(seconds: float, hours: bool = False) -> str:
    """Whole seconds as m:ss, from one hour on (or with `hours` always) as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    above, minutes = divmod(minutes, 60)
    if above or hours:
        return f"{above}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
