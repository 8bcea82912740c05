"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the file, field or limit and says what to do.

    The doors print it without a traceback and exit with code 2.
    """
