"""What is printed, wherever it goes: names with any characters in them, and streams that cannot encode every one."""

import codecs
from collections.abc import Iterable

__all__ = ["encodable", "encode_everything", "printable"]

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
    """A name as it may stand in a line of a terminal or of a picture: line breaks, escapes and their like written out.

    What is left is one line that moves no cursor and sets no colour: "a\\nb" for a name with a line break in it.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def encodable(text: str, encoding: str) -> str:
    """The text with stand-ins of ASCII for what the encoding lacks."""
    return text.encode(encoding, HANDLER).decode(encoding)


def encode_everything(streams: Iterable[object]) -> None:
    """Let text streams write every character: what their encoding lacks gets a stand-in of ASCII, `->` for an arrow.

    Args:
        streams: sys.stdout and sys.stderr, say; those that have no encoding to change are left alone.
    """
    for stream in streams:
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=HANDLER)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: what is known by a stand-in, all else as Python writes it in a string."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in part), error.end


codecs.register_error(HANDLER, _stand_in)
