"""Every error that Saddlepoint raises on purpose.

    SaddlepointError            exit code 1: something failed that the user did not write
    ├── UsageError              exit code 2: a name, parameter, file or flag that the user can correct
    │   ├── PolicyError         a policy file breaks its format
    │   └── ContaminationError  a checkpoint would be scored on behaviors it was trained on
    ├── MissingExtraError       a method needs an optional part: the message has the pip line
    ├── ModelError              weights cannot be had, or are not what they should be
    ├── TargetError             a target cannot be reached at all (one failed query is a Completion.error instead)
    ├── TrainingError           an example with nothing to learn, a loss that is not a number
    └── StoreError              a run cannot be read or written

Each message says what was wrong, what is allowed, what was got, and what to do next, on one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SaddlepointError(Exception):
    exit_code = 1


class UsageError(SaddlepointError, ValueError):
    exit_code = 2


class PolicyError(UsageError): ...


class ContaminationError(UsageError): ...


class MissingExtraError(SaddlepointError, ImportError): ...


class ModelError(SaddlepointError): ...


class TargetError(SaddlepointError): ...


class TrainingError(SaddlepointError): ...


class StoreError(SaddlepointError): ...


def unknown(what: str, got: str, allowed: Iterable[str], hint: str) -> UsageError:
    """The error for a name that does not exist: `no attack 'piar'; closest: 'pair'; list: saddlepoint list attacks`."""
    names = sorted(allowed)
    near = get_close_matches(got, names, n=1, cutoff=0.5)
    middle = f"closest: '{near[0]}'" if near else f"there are: {', '.join(names) or 'none'}"
    return UsageError(f"no {what} '{got}'; {middle}; {hint}")
