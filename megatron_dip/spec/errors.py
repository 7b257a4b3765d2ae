"""The one error type for a user's mistake.

Every room raises :class:`InputError` for input that a person can mend (a field of a file, a flag, a tensor's shape); our own
invariants are ``assert`` statements instead. The command line prints the message alone and exits with :data:`EXIT_CODE`.
"""

from __future__ import annotations

EXIT_CODE = 2
"""Exit status of every command that ends in an :class:`InputError`."""


class InputError(ValueError):
    """A mistake in what the user gave: names the field, the value, what is wrong and what to do.

    Args:
        field: where the value stands, in the user's own words: ``training.dtype``, ``--pipeline``, ``microbatches[3].vit[0]``.
        value: what was found there.
        problem: what is wrong with it, one clause without a full stop.
        remedy: what to change, one clause without a full stop.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field if len(field) <= 300 else f"{field[:140]} ... {field[-140:]}"
        self.value = value
        self.problem = problem
        self.remedy = remedy
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{self.field} = {shown}: {problem}. Remedy: {remedy}.")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str, str]]:
        # Exceptions pickle by their message alone; ranks and worker processes send these to each other.
        return (type(self), (self.field, self.value, self.problem, self.remedy))
