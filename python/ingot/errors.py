"""The errors that a user can meet. Each message is one line that names the file, row, field or flag and says what to do."""

from __future__ import annotations


class IngotError(ValueError):
    """Base of all errors that ingot raises on purpose; the command line prints them without a traceback."""


class ConfigError(IngotError):
    """A setting is unknown, out of range, or does not fit another one."""


class UsageError(ConfigError):
    """A command lacks a flag that it needs; the command line then ends with the exit code of wrong usage, 2."""


class DataError(IngotError):
    """Text, rows or token files that cannot be used as they are."""


class CheckpointError(IngotError):
    """A saved model or training state is torn, altered, incomplete, or from a newer version."""


class RunError(IngotError):
    """A run cannot start, go on or be saved: its folder is in use, it would not fit, or its loss is no number."""
