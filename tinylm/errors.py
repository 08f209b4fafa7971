"""The one error that a person is meant to read: it names the rule, the value received and the way out."""

from __future__ import annotations

LONG = 2000  # characters of what was received that a message repeats at most


class LabError(ValueError):
    """A mistake in what was asked, or trouble with the machine, told in words a person can act on.

    The command line and the studies print it without a traceback. ``rule`` says what must hold, ``got`` the value
    received and ``fix`` the way out.
    """

    def __init__(self, rule: str, got: object = None, fix: str | None = None):
        self.rule, self.got, self.fix = rule, got, fix
        parts = [rule.rstrip(".") + "."]
        if got is not None:
            got = str(got)
            parts.append(f"Received: {got if len(got) <= LONG else got[:LONG] + ' ...'}.")
        if fix:
            parts.append(f"Way out: {fix.rstrip('.')}.")
        super().__init__(" ".join(parts))

    def __reduce__(self):  # errors cross process borders whole
        return (type(self), (self.rule, None if self.got is None else str(self.got), self.fix))


class ConfigError(LabError):
    """A hyperparameter that cannot be what it was set to."""


class TextError(LabError):
    """A text that cannot be read, or is too small for what was asked of it."""


class DamagedFileError(LabError):
    """A file of ours (record, checkpoint, map, tokenizer) that is truncated, altered or of another kind."""
