"""Checkpoints by their name on the Hugging Face hub, through `huggingface_hub`: its cache, offline flag and token."""

import os
import re

from mi_jax.models.checkpoints.errors import CheckpointError

# The weights under the one name that counts, never pickles or the same weights once more in another form.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def checkpoint_directory(path_or_hub_id: str | os.PathLike, *, revision: str | None = None) -> str:
    """The local directory of a checkpoint; a hub id is downloaded into the hub's cache unless it is there already.

    A directory of that name takes precedence. HF_HOME moves the cache, HF_HUB_OFFLINE=1 forbids the network, HF_TOKEN
    opens gated models.

    Args:
      revision: branch, tag or commit of a hub id.

    Raises:
      CheckpointError: no such directory, `huggingface_hub` is not installed, the hub does not know the id or gives no
        access to it, or it cannot be reached and the cache lacks the model.
    """
    path = os.fspath(path_or_hub_id)
    if os.path.exists(path):
        if not os.path.isdir(path):
            raise CheckpointError(f"{path}: is a file; give the directory with its config.json, or a .gguf file")
        if revision is not None:
            raise CheckpointError(f"{path}: is a directory; revision={revision!r} is for ids of the hub")
        return path
    if not _ID.fullmatch(path):
        raise CheckpointError(
            f"{path}: no such file or directory, and not an id of the hub, which is like 'owner/name'"
        )
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{path}: no such directory. As an id of the hub it needs huggingface_hub, which is not installed: "
            "pip install 'mi-jax[hub]'"
        ) from None
    where = f"hub id {path!r}" + (f", revision {revision!r}" if revision else "")
    try:
        return huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=list(FILES))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{where}: access must be asked for at https://huggingface.co/{path}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where}: the hub knows no such model, or it is private; check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{where}: the model has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where}: no such directory here, not in the cache, and the hub is out of reach or forbidden by "
            "HF_HUB_OFFLINE; go online once, or give the path of a directory"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"{where}: download failed ({type(error).__name__}: {error})") from error
