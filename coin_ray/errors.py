"""Define every error a user can meet, as one tree.

    CoinError
    ├── ConfigError    a setting is unknown, impossible or contradicts another          exit 2
    ├── InputError     images, annotations or checkpoints that can't be used            exit 2
    ├── StepError      an earlier stage is not finished, or a file it wrote is damaged  exit 2
    ├── RootInUse      another run holds the root                                       exit 2
    ├── StorageUnavailable  the run's storage stayed away for storage.patience          exit 3
    ├── TrainingError  a loss is no longer finite; names the part                       exit 1
    └── CloudError     a call to the detection API
        ├── stops the run:    AuthError, CloudUnreachable                               exit 4
        │                     QuotaExhausted, BudgetExhausted                           exit 5
        │                     BadRequest                                                exit 1
        ├── is retried:       Throttled, Transient, DeadlineExceeded
        └── marks the image:  ImageRejected, ProtocolError (UnusableBoxes), Refused

A message states what was expected, the actual value, and what to do. It never contains
a secret or image bytes.
"""

from __future__ import annotations

import errno
import os

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of an OSError from a full disk or quota."""


def describe_variables(*names: str) -> str:
    """Return the names of environment variables and whether each is set, for messages
    about refused credentials; never what they hold.
    """
    states = []
    for name in names:
        state = "set" if os.environ.get(name, "").strip() else "not set"
        states.append(f"{name} ({state})")
    return ", ".join(states)


class CoinError(Exception):
    """Base of all errors raised for users; ``exit_code`` is what the command line
    returns.
    """

    exit_code = 1


class ConfigError(CoinError, ValueError):
    exit_code = 2


class InputError(CoinError, ValueError):
    exit_code = 2


class StepError(CoinError, RuntimeError):
    exit_code = 2


class RootInUse(CoinError, RuntimeError):
    exit_code = 2


class StorageUnavailable(CoinError, RuntimeError):
    exit_code = 3


class TrainingError(CoinError, RuntimeError):
    pass


class CloudError(CoinError):
    """A call to the detection API failed. ``may_have_billed``: the service may count
    the call although no response arrived.
    """

    retryable = False
    stops_run = False

    def __init__(self, message: str, *, may_have_billed: bool = False) -> None:
        super().__init__(message)
        self.may_have_billed = may_have_billed


class AuthError(CloudError):
    stops_run = True
    exit_code = 4


class CloudUnreachable(CloudError):
    stops_run = True
    exit_code = 4


class QuotaExhausted(CloudError):
    stops_run = True
    exit_code = 5


class BudgetExhausted(CloudError):
    stops_run = True
    exit_code = 5


class BadRequest(CloudError):
    stops_run = True


class Throttled(CloudError):
    """``retry_after``: seconds the service asked to wait, or None."""

    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Transient(CloudError):
    retryable = True


class DeadlineExceeded(CloudError):
    retryable = True


class ImageRejected(CloudError):
    pass


class ProtocolError(CloudError):
    """The response could not be parsed. It is quarantined, never read as "no
    objects".
    """


class UnusableBoxes(ProtocolError):
    """The response is whole, but its boxes are in another unit, outside the image or of
    other names. Asking again would give the same.
    """


class Refused(CloudError):
    pass
