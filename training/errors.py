"""Errors a user can mend: the command prints the one line and exits with status 2."""


class UserError(Exception):
    """Something about the input, the configuration or the machine. The message names it and the remedy."""
