"""A Hugging Face hub that is played: huggingface_hub asks a function in the place of the network."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory

HTTP: Any = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
"""The HTTP library of huggingface_hub, which is not the same in every version."""


@contextmanager
def played(answer: Callable[[Any], Any], cache: Path) -> Iterator[None]:
    """Give every request of huggingface_hub to `answer`, and keep what comes in the folder `cache`."""
    transport = HTTP.MockTransport(answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        huggingface_hub.set_client_factory(lambda: HTTP.Client(transport=transport, follow_redirects=True))
        try:
            yield
        finally:
            huggingface_hub.set_client_factory(default_client_factory)
