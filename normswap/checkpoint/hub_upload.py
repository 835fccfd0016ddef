"""Upload a folder that `save` wrote to the Hugging Face hub."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from normswap.checkpoint.card import model_card
from normswap.checkpoint.folder import CARD, CONFIG, WEIGHTS, whole
from normswap.errors import HubError, InvalidOption, first_line


@dataclass(frozen=True)
class Upload:
    """What goes, or went, to the hub.

    Attributes:
        repository: ``user/name``.
        files: Sizes in bytes by file name.
        card: The model card.
        url: Where the repository is; None where nothing was sent.
    """

    repository: str
    files: dict[str, int]
    card: str
    url: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {"repository": self.repository, "files": self.files, "url": self.url}

    def __str__(self) -> str:
        """Return a line per file, and where they are."""
        rows = [f"{name}  {size:,} bytes" for name, size in self.files.items()]
        end = f"pushed to {self.url}" if self.url else f"would push to {self.repository}; nothing was sent"
        return "\n".join([*rows, end])


def push(
    directory: str | PathLike[str],
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Upload:
    """Upload a checkpoint, with a model card that says how to load it from there.

    >>> push("OUT", "user/resnet50-gn")

    Args:
        directory: A folder that `normswap.save` wrote.
        repository: ``user/name``; made if it does not exist.
        private: Make a new repository private.
        dry_run: Look at the checkpoint and write the card, but send nothing.
        endpoint: Address of the hub; by default ``HF_ENDPOINT`` or the public one.
        token: Access token; by default the one of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        InvalidOption: `repository` is no name on the hub.
        CheckpointError: The folder holds no whole checkpoint.
        HubError: The hub refused or did not answer.
    """
    directory = Path(directory)
    _must_name_a_repository(repository)
    with whole(directory, dict) as (config, weights):
        card = model_card(config, repository)
    contents: dict[str, Path | bytes] = {WEIGHTS: weights, CARD: card.encode(), CONFIG: directory / CONFIG}
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in contents.items()}
    if dry_run:
        return Upload(repository, sizes, card, None)
    api = HfApi(endpoint=endpoint, token=token, library_name="normswap")
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Add a network without BatchNorm")
    except LocalTokenNotFoundError as error:
        raise HubError("no access token is stored; run `hf auth login` first") from error
    except Exception as error:  # besides its own the hub's client raises those of the HTTP library it happens to use
        raise HubError(f"{repository}: {first_line(error)}; check the name and your access token") from error
    return Upload(repository, sizes, card, str(url))


def _must_name_a_repository(name: str) -> None:
    """Raise unless the hub takes a name; one without a user it would take, too, and look for elsewhere."""
    try:
        validate_repo_id(name)
        known = "/" in name
    except HFValidationError:
        known = False
    if not known:
        raise InvalidOption(f"{name!r:.120} is no repository; write user/name")
