"""No loading bars or hints from the model libraries: a run has its own. Imports them only when it is called."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Once, and before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
