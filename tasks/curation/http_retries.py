"""Waits between retries of HTTP requests."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # doubles with each retry; multiplied by a random factor from 0.5 to 1
LONGEST_RETRY_AFTER_S = 600.0


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None if it is missing or invalid."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return None
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S) if seconds == seconds else None


def wait_s(retry: int, after_s: float | None) -> float:
    """Seconds to wait.

    Args:
        retry: from 0.
        after_s: the minimum that the server requests, see `retry_after_s`.
    """
    backoff_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(retry, 10))
    return max(after_s or 0.0, backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  (spreads retries)
