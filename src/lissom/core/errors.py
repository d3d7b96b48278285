"""The one tree of errors.

A message says what is wrong, where (tensor, shape, file), what is allowed, and what to do next.
Everything that the user can mend derives from :class:`LissomError`; the command line prints the
message without a traceback and leaves with :attr:`LissomError.exit_code`.
"""


class LissomError(Exception):
    """Base of all errors that a user can cause or mend."""

    exit_code = 1


class RecipeError(LissomError):
    """The recipe does not fit the model. Holds *all* problems that were found."""

    exit_code = 2

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems if len(self.problems) == 1 else [f"- {p}" for p in self.problems]
        super().__init__("\n".join(lines))


class CheckpointError(LissomError):
    """The checkpoint is missing, damaged, unsafe or of an unknown architecture."""

    exit_code = 3


class CalibrationError(LissomError):
    """The calibration or evaluation text cannot be used."""

    exit_code = 4


class OutputError(LissomError):
    """The output cannot be written: it exists, the disk is full, or a resume does not match."""

    exit_code = 5


class NumericalError(LissomError):
    """The mathematics broke down (not positive definite, non-finite values)."""

    exit_code = 6


class FormatError(LissomError):
    """An export format cannot hold what the recipe makes, or a packed file is damaged."""

    exit_code = 7
