"""Join an instruction and its input, or both turns of a conversation, into one text."""

from __future__ import annotations


def two_turns(first: str, second: str) -> str:
    """Return both questions, or both answers, of a conversation as one text."""
    return f"[turn 1]\n{first}\n\n[turn 2]\n{second}"


def with_input(instruction: str, input: str) -> str:
    """Return instruction and input as one text."""
    return f"{instruction}\n\n{input}" if input else instruction
