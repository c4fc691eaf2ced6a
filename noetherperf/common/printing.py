"""Printing anywhere: names with control characters, streams that cannot encode every character, closed pipes."""

import codecs
import io
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["encodable", "encode_everything", "outlive_reader", "printable"]

HANDLER = "noetherperf.stand_in"
STAND_INS = {
    "–": "-",
    "−": "-",
    "─": "-",
    "·": "*",
    "×": "x",
    "½": "1/2",
    "√": "sqrt ",
    "…": "...",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "∝": "~",
    "±": "+-",
    "∞": "inf",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "⟨": "<",
    "⟩": ">",
    "‖": "||",
    "∇": "grad ",
    "∂": "d",
    "∫": "int ",
    "Σ": "sum ",
    "ẋ": "x'",
    "ẍ": "x''",
    "\u0307": "'",
    "\u0308": "''",
    "\u0304": "_mean",
    "\u00a0": " ",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "eps",
    "η": "eta",
    "θ": "theta",
    "κ": "kappa",
    "λ": "lambda",
    "μ": "mu",
    "π": "pi",
    "τ": "tau",
    "ψ": "psi",
    "ω": "omega",
    **{c: f"^{n}" for n, c in zip("0123456789-Tpt", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵖᵗ", strict=True)},
    **{c: f"_{n}" for n, c in zip("0123456789ij", "₀₁₂₃₄₅₆₇₈₉ᵢⱼ", strict=True)},
}


def printable(text: str) -> str:
    """A name as one line for a terminal or a picture, with unprintable characters escaped.

    So it moves no cursor and sets no colour: "a\\nb" for a name with a line break in it.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def encodable(text: str, encoding: str) -> str:
    """The text with ASCII stand-ins for the characters that the encoding lacks."""
    return text.encode(encoding, HANDLER).decode(encoding)


def encode_everything(streams: Iterable[object]) -> None:
    """Make text streams write every character: one that their encoding lacks gets an ASCII stand-in, `->` for an arrow.

    Args:
        streams: sys.stdout and sys.stderr, say; streams that cannot be reconfigured stay as they are.
    """
    for stream in streams:
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=HANDLER)


def outlive_reader(stream: TextIO) -> TextIO:
    """The same stream, but once its reader is gone (`noetherperf info | head -1`), what is written goes nowhere.

    Args:
        stream: sys.stdout, say; one that is no file of the system is returned as it is.
    """
    buffer = getattr(stream, "buffer", None)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(buffer, "raw", buffer), io.FileIO):
        return stream
    stream.flush()
    pipe = _Pipe(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(pipe) if isinstance(buffer, io.BufferedWriter) else pipe,  # as python -u has it
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Pipe(io.FileIO):
    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Error handler for codecs: a stand-in where STAND_INS has one, else a backslash escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in part), error.end


codecs.register_error(HANDLER, _stand_in)
