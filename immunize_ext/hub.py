"""Models by their name on huggingface.co, as well as by folder.

Only weights in safetensors and plain settings are fetched: what could run code is not even there.
"""

from __future__ import annotations

import re
from pathlib import Path

from immunize_ext._extras import require_extra

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_PLAIN = ("*.json", "*.txt", "*.model")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can only be one on huggingface.co: ``owner/model``, or with ``@revision``.

    Example:
        >>> is_hub_id("CompVis/stable-diffusion-v1-4"), is_hub_id("./models/sd14")
        (True, False)
    """
    return isinstance(name, str) and _ID.fullmatch(name) is not None and not Path(name).exists()


def model_folder(
    name: str | Path, *, function: str, index: str, variant: str | None = None
) -> Path:
    """The folder of a model: itself, or what is fetched into the cache once.

    Args:
        name: A folder, or ``owner/model`` with an optional ``@revision``.
        function: Who asks; stands in errors.
        index: The file that such a folder holds.
        variant: Which files of weights, such as ``fp16``.

    Returns:
        The folder. Of a name that is no hub id it is that name, whether it is there or not.

    Raises:
        FileNotFoundError: If the model is not in the cache and cannot be fetched; one line says
            what to do.
        MissingExtraError: If huggingface_hub is not installed.
    """
    if not is_hub_id(name):
        return Path(name)
    hub = require_extra("huggingface_hub", extra="diffusion", purpose="models by name")
    repository, _, revision = str(name).partition("@")
    # Weights in the folders of a pipeline's parts: single files beside them are copies of all.
    weights = "*/*.safetensors" if index == "model_index.json" else "*.safetensors"
    ending = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
    wanted = weights.replace("*.safetensors", ending)
    left_out = (
        ["*.fp16*.safetensors", "*.bf16*.safetensors", "*non_ema*"] if variant is None else []
    )
    errors = hub.errors
    try:
        found = hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[*_PLAIN, wanted],
            ignore_patterns=left_out,
        )
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{function}: {name} must be a folder or a model on huggingface.co, got neither; is it "
            "spelt so, or private (hf auth login)?"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{function}: {repository} must have the revision {revision}, got none of that name"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{function}: {name} must be a folder or a model that can be fetched: no such folder, "
            f"and huggingface.co is not reached ({type(error).__name__}); run `hf download "
            f"{repository}` where there is a network, or give a folder"
        ) from None
    folder = Path(found)
    if not (folder / index).is_file():
        raise FileNotFoundError(f"{function}: {name} must hold {index}, got another kind of model")
    return folder
