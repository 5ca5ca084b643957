"""Hub repositories: one snapshot of one, of which no file comes that is not needed.

What lies beside weights and is small (configs, indices, tokenizer files) always comes along; weight
files come one by one, when they are asked for. The client (`huggingface_hub`) keeps its cache, its
tokens and its offline mode.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from medalign_jax.weights.lazy import WeightError

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
      label: how errors call it.
      repository, revision: as asked for.
      folder: of the client's cache, where its files lie; its name is the commit.
      names: files of the repository, or, where the Hub cannot be asked, of the cache.
      unreachable: why the Hub cannot be asked; "" where it can.
    """

    label: str
    repository: str
    revision: str | None
    folder: Path
    names: frozenset[str]
    unreachable: str

    def fetch(self, name: str) -> Path:
        """Where a file of the repository lies, once it is there.

        Raises:
          WeightError: there is no such file, or it cannot be had; says what to do.
        """
        import huggingface_hub  # here, because most sources need no Hub

        if name not in self.names:
            raise WeightError(
                f"{self.label}: no file {name} in the repository, or in what the cache holds of it"
                + (f" ({self.unreachable})" if self.unreachable else "")
            )
        try:
            commit = self.folder.name
            return Path(huggingface_hub.hf_hub_download(self.repository, name, revision=commit))
        except Exception as error:  # the client lets errors of its network library through
            why = _reason(self.repository, self.revision, error, f"{name} is")
            raise WeightError(f"{self.label}: {why}") from error


def open_snapshot(label: str, repository: str, revision: str | None, folder: str = "") -> Snapshot:
    """Fetches what is small of a repository, and the list of what else it has.

    Args:
      label: how errors call the source.
      repository: `org/name`.
      revision: branch, tag or commit; None for the main branch.
      folder: of the repository, where the weights are that are wanted; "" for its top.

    Raises:
      WeightError: no such repository or revision, no permission, or neither network nor cache; says
        what to do.
    """
    import huggingface_hub

    places = {"", f"{folder}/" if folder else ""}
    try:
        cached = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[f"{place}{pattern}" for place in places for pattern in _BESIDE],
            ignore_patterns=None if folder else ["*/*"],
        )
    except Exception as error:  # the client lets errors of its network library through
        raise WeightError(f"{label}: {_reason(repository, revision, error)}") from error
    commit, unreachable = Path(cached), ""
    try:
        about = huggingface_hub.HfApi().model_info(repository, revision=commit.name)
        names = [file.rfilename for file in about.siblings or ()]
    except Exception as error:  # then the cache is all there is; raised where that is not enough
        unreachable = _reason(repository, revision, error)
        files = (path for path in commit.rglob("*") if path.is_file())
        names = [PurePosixPath(path.relative_to(commit)).as_posix() for path in files]
    return Snapshot(label, repository, revision, commit, frozenset(names), unreachable)


def push(folder: Path, names: Sequence[str], repository: str, private: bool) -> str:
    """Uploads files of a folder to a repository, made if need be, in one commit; gives its address.

    Raises:
      WeightError: the Hub refuses or cannot be reached; says what to do.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(names),
            commit_message="Export of medalign_jax",
        )
    except ValueError as error:  # a name that is none, or no token
        raise WeightError(f"{repository}: {error}") from error
    except ConnectionError as error:
        raise WeightError(
            f"{repository}: the Hub cannot be reached ({error}); connect, unset HF_HUB_OFFLINE and "
            "push again"
        ) from error
    except Exception as error:  # the client lets errors of its network library through
        raise WeightError(f"{repository}: {_reason(repository, None, error)}") from error
    return f"{hub.endpoint}/{repository}"


def _reason(
    repository: str,
    revision: str | None,
    error: Exception,
    absent: str = "no such file or folder here,",
) -> str:
    """What went wrong at the Hub, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"gated: accept the licence at https://huggingface.co/{repository} "
            "and log in with `hf auth login` (older clients: `huggingface-cli login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"not found: the repository has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "not found: no such file, folder or Hub repository; check the spelling, "
            "or log in with `hf auth login` if it is private"
        )
    status = _http_status(error)
    if status in (401, 403):
        return (
            f"refused by the Hub (HTTP {status}): the token is wrong, has expired or does not "
            "cover this repository; log in anew with `hf auth login`"
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return (
            "only a part is in the Hub's cache, and the Hub cannot be reached; connect and repeat"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        why = f"answers HTTP {status}" if status else "cannot be reached"
        return (
            f"offline: {absent} not in the Hub's cache, and the Hub {why}; "
            "connect, or give a local folder"
        )
    return f"the Hub's client failed ({type(error).__name__}: {error})"


def _http_status(error: BaseException | None) -> int | None:
    """Of the answer that the error, or the one that it was raised from, is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None
