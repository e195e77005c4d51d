"""JSON that others wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value that `text` holds.

    Raises:
        json.JSONDecodeError: broken JSON, and JSON that Python does not read (nested about a thousand deep, a number
            of thousands of digits), for which `json.loads` has errors of other kinds.
        UnicodeDecodeError: bytes that are no text.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error).split(";")[0]  # what follows is advice to programmers
    raise json.JSONDecodeError(reason, text if isinstance(text, str) else "", 0)
