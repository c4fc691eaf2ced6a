"""Shared by tests of interrupts: a KeyboardInterrupt at any event of Python code."""

import sys
from collections.abc import Callable
from typing import Any

import torch


class Interrupt:
    """Raises KeyboardInterrupt at an event (a call, a line, a return) of Python code; 0: it counts them."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> "Interrupt":
        self.count += 1
        if self.count == self.at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def during(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # torch's no_grad may be left half open
