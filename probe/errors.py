"""The error tree. Each message says what must hold, what came, and what to do.

MmditError                  exit code 1: something failed
├── StoreError              a run folder or one of its files
├── TapError                the attention calls of a model could not be reached or followed
├── ModelError              a model folder, id or checkpoint could not be loaded
├── ProofError              a model failed its own self-check
└── UsageError              exit code 2: the request itself is wrong
    ├── WordError           a word that is not in the prompt
    ├── LayoutError         tokens that do not fit the model's layout
    ├── PlanError           handlers that clash, or that met no call
    └── RecipeError         a recipe that does not validate
"""


class MmditError(Exception):
    """Any error this project raises on purpose. Its text is one clear sentence for the user."""

    exit_code = 1


class StoreError(MmditError):
    """A run folder, or a file in it, cannot be read or written."""


class TapError(MmditError):
    """The attention calls of a model cannot be reached, or some were missed."""


class ModelError(MmditError):
    """A model cannot be found, loaded or recognised."""


class ProofError(MmditError):
    """A model did not pass its own self-check (`mmdit check`)."""


class UsageError(MmditError):
    """The request itself is wrong; nothing was run."""

    exit_code = 2


class WordError(UsageError):
    """A word is not part of the prompt, or its tokens cannot be told."""


class LayoutError(UsageError):
    """A token set does not fit the layout of the model."""


class PlanError(UsageError):
    """Handlers clash with each other, or one of them met no attention call."""


class RecipeError(UsageError):
    """A recipe cannot be read or does not validate."""
