"""What people type for a checkpoint: a folder, a GGUF file, or a name on the Hugging Face Hub.

The Hub is asked through huggingface_hub, with its cache, progress bars, tokens and switches (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, `hf auth login`).
"""

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# org/name, org/name@revision, and either followed by /file.gguf
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@:]+?))?(/(?P<file>[^@:]+\.gguf))?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken"]
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*", "*checkpoint-*/*", "*adapter_model*"]


def find(name: str | Path) -> Path:
    """The folder or GGUF file that a name means; what is on the Hub only is downloaded to its cache.

    name: a path; or org/name or org/name@revision on the Hub, whose weights, configs and tokenizer are fetched; or one
          GGUF file there, org/name/file.gguf. What exists on this machine comes first.
    Raises FileNotFoundError or ValueError with the reason and the remedy if there is no such thing.
    """
    path = Path(name)
    if path.exists():
        return path
    asked = _NAME.fullmatch(str(name))
    if asked is None or isinstance(name, Path):
        raise FileNotFoundError(f"{name}: no such folder or file" + ("" if isinstance(name, Path) else _HINT))
    repo, revision, file = asked["repo"], asked["revision"], asked["file"]
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        return folder if any(folder.glob("*.safetensors")) else _only_gguf(repo, revision, folder)
    except GatedRepoError:
        raise ValueError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then `hf auth login`, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo} on the Hugging Face Hub has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{name}: there is no such folder or file here, nor in the cache of the Hugging Face Hub, which cannot be "
            "reached now (no network, or HF_HUB_OFFLINE is set)"
        ) from None
    except EntryNotFoundError:
        raise ValueError(f"{repo} on the Hugging Face Hub has no file {file}") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: there is no such folder or file here, and no such model on the Hugging Face Hub; a private one "
            "needs `hf auth login` or HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder or file, and no name on the Hub ({error})") from None
    except (HfHubHTTPError, OSError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{name}: the Hugging Face Hub did not answer as it should: {words:.300}") from None


def from_anywhere(name: str | Path) -> str:
    """What means in any folder what `name` means in this one: paths in full, names on the Hub as they are."""
    path = Path(name)
    asked = isinstance(name, str) and not path.exists() and _NAME.fullmatch(name) is not None
    return str(name) if asked else str(path.resolve())


_HINT = "; a name on the Hugging Face Hub has the form org/name"


def _only_gguf(repo: str, revision: str | None, folder: Path) -> Path:
    """The one GGUF file of a repository that has no other weights."""
    here = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gguf"))
    try:
        files = [file for file in HfApi().list_repo_files(repo, revision=revision) if file.endswith(".gguf")]
    except (HfHubHTTPError, OSError):
        files = here
    if len(files) == 1:
        return Path(hf_hub_download(repo, files[0], revision=revision))
    if not files:
        raise ValueError(
            f"{repo} on the Hugging Face Hub has neither safetensors nor GGUF files; others are not read here"
        )
    raise ValueError(
        f"{repo} has {len(files)} GGUF files; name one: {', '.join(f'{repo}/{file}' for file in files[:8])}"
    )
