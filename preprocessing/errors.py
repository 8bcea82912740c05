"""The one kind of error that is the user's to mend, and how a message is made fit to be sent to a stranger."""

import re

LONGEST_MESSAGE = 300  # characters that a client is told; what is longer was never one sentence

_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*[;,][^\s'\")\]]*")
_USER_INFO = re.compile(r"(?<=://)[^\s/?#@'\"]+@")
# Also of an address without its host, which is how urllib3 quotes one; a question at a sentence's end has no "=".
_QUERY = re.compile(r"\?[^\s'\"<>?]*=[^\s'\"<>)\]]*")
_TOKENS = re.compile(r"\b(?:hf|r8|ghp|github_pat|sk)[_-][A-Za-z0-9_-]{16,}|(?i:\bbearer )[\w.~+/=-]{8,}")


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the file, field or limit and says what to do.

    The doors print it without a traceback and exit with code 2.
    """


def redacted(text: str) -> str:
    """`text` without what may be secret in an address: user name, password, query; data URLs lose their content.

    >>> redacted("https://me:pw@127.0.0.1/a.zip?token=x cannot be read")
    'https://127.0.0.1/a.zip cannot be read'
    """
    for pattern, put in ((_DATA_URL, "data:..."), (_USER_INFO, ""), (_QUERY, ""), (_TOKENS, "***")):
        text = pattern.sub(put, text)
    return text


def short(text: str) -> str:
    """`text` on one line, redacted, and cut where it is no sentence any more."""
    line = " ".join(redacted(text).split())
    return line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3].rstrip() + "..."
