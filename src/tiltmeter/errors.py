"""Every error tiltmeter raises on purpose.

::

    TiltmeterError                 exit code 1
    ├── InputError                 exit code 2: something the user gave cannot be used
    │   ├── DataError              a data file or its rows
    │   ├── ModelError             a model, tokenizer or adapter cannot be loaded
    │   ├── UnsupportedModel       the model loads, but this quantity cannot be measured on it
    │   ├── RecipeError            the training recipe
    │   ├── OutputExists           the output folder is already there
    │   ├── MissingDemoData        the embedded data was never fetched and there is no network
    │   ├── SpaceMismatch          two things were built on different parameters
    │   ├── DegenerateError        the data do not determine what was asked for
    │   └── OutOfMemory            the job does not fit the memory it may use
    ├── NumericalError             exit code 2: a loss or product is not finite
    ├── PartLost                   exit code 2: a process of those that a model is divided among cannot go on
    ├── WorkerLost                 exit code 1: a process of a pool died
    └── DownloadError              exit code 1: the network or the registry failed half way

A message says what was expected, what came, and what to do about it.
"""

from __future__ import annotations


class TiltmeterError(Exception):
    """Root of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(TiltmeterError):
    """Something the user gave cannot be used."""

    exit_code = 2


class DataError(InputError):
    """A data file is missing, malformed, empty or has the wrong columns."""


class ModelError(InputError):
    """A model, tokenizer or adapter cannot be loaded."""


class UnsupportedModel(InputError):
    """The model loads, but the quantity asked for cannot be measured on it."""


class RecipeError(InputError):
    """The training recipe is incomplete or names something unknown."""


class OutputExists(InputError):
    """The output folder already exists; results are never overwritten."""


class MissingDemoData(InputError):
    """The embedded model or data is not in the cache and could not be fetched."""


class SpaceMismatch(InputError):
    """Two quantities were built on different parameter spaces or lengths."""


class DegenerateError(InputError):
    """The data do not determine what was asked for (for example more directions than examples)."""


class OutOfMemory(InputError):
    """The job does not fit the memory it was given."""


class NumericalError(TiltmeterError):
    """A loss, gradient or product is not finite."""

    exit_code = 2


class PartLost(TiltmeterError):
    """One of the processes that a model is divided among cannot go on, and so none can."""

    exit_code = 2


class WorkerLost(TiltmeterError):
    """A process of a pool died; what was finished is kept, and the same command goes on from there."""


class DownloadError(TiltmeterError):
    """A download failed half way; nothing half-written is left in the cache."""
