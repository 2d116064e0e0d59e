"""Errors that are the user's to mend: the command line ends with exit code 2 on these."""


class InputError(ValueError):
    """Input (a file, a configuration, an argument) breaks a rule.

    The message names the argument or the line, the rule and the value received, and says what to
    do. Several faults of one input are reported together, one a line.

    Args:
        problems: one message, or several, each a full sentence.

    Example:
        >>> raise InputError(["beta must be > 0, got -1.0.", "epochs must be >= 1, got 0."])
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: beta must be > 0, got -1.0.
        epochs must be >= 1, got 0.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
