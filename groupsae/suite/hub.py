"""The Hugging Face Hub: repositories are named `hf:owner/name` or `hf:owner/name@revision`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import hub_is_unknown, is_network_error

PREFIX = "hf:"
_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


class Repository(NamedTuple):
    """A repository of the Hub; revision None is its newest state."""

    name: str
    revision: str | None


def repository(path: object) -> Repository | None:
    """Return the repository that a path names; None if it names a folder.

    Raises:
        UserError: it begins with `hf:`, but no name of a repository follows.

    >>> repository("hf:owner/name@v1")
    Repository(name='owner/name', revision='v1')
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return None
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    check_name(name, text)
    return Repository(name, revision if at else None)


def check_name(name: str, given: str) -> None:
    """Raise UserError unless this is `owner/name`."""
    if not _NAME.match(name):
        raise UserError(
            f"{given} does not name a repository of the Hub: write owner/name, with letters, "
            "digits, '-', '_' and '.' only."
        )


def looks_like_name(text: str) -> bool:
    """Return whether a text could be `owner/name` on the Hub, and is no local folder."""
    return bool(_NAME.match(text)) and text[0] not in "./" and not Path(text).exists()


def local_folder(path: str | Path, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder that a path names: on this machine, or a local copy of a repository.

    Args:
        path: a folder, or `owner/name`, `owner/name@revision`, with `hf:` before it or not. A
            folder of this name wins over a repository, unless `hf:` stands before it.
        revision: branch, tag or commit of the repository.
        patterns: the files of the repository that are needed.

    Raises:
        UserError: there is no such folder or repository, or the Hub cannot be reached.
    """
    text = str(path)
    repo = repository(text)
    guessed = repo is None and looks_like_name(text.partition("@")[0])
    if guessed and not Path(text).exists():
        repo = repository(PREFIX + text)
    if repo is None:
        if revision is not None:
            raise UserError(f"{path} is no repository of the Hub: leave out revision={revision}.")
        return Path(path).expanduser()
    if revision is not None and repo.revision is not None:
        raise UserError(f"{path} names a revision already: leave out revision={revision}.")
    try:
        return download(repo._replace(revision=revision or repo.revision), patterns)
    except UserError as error:
        here = f"there is no folder {path} here, and " if guessed else ""
        raise UserError(f"{here}{error}") from error


def download(repo: Repository, patterns: Sequence[str]) -> Path:
    """Return a local folder with the files of a repository that match; kept in the Hub's cache.

    Raises:
        UserError: the repository or revision does not exist or may not be read, or the Hub
            cannot be reached and the cache does not hold the files.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo.name, repo.revision):
        return Path(
            snapshot_download(
                repo.name,
                revision=repo.revision,
                allow_patterns=list(patterns),
                local_files_only=hub_is_unknown(),
            )
        )


def upload(
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool,
    replaced: Callable[[str], bool] | None,
    revision: str | None = None,
) -> str:
    """Commit files to a repository, which is created if necessary; return its address.

    The token is that of `hf auth login` or HF_TOKEN; it is neither printed nor stored.
    `files` are the content or the files by their paths in the repository, `name` is owner/name.
    In a repository that holds files, those that are not among the new ones are removed where
    `replaced` says so; without `replaced` such a repository is left alone. `revision` is the
    branch to commit to, made from the main one if necessary; None: the main one.

    Raises:
        UserError: the repository holds files and may not be changed, no token is found or it may
            not write there, or the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"no token to write hf:{name}: log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write."
        )
    with _explained(name, revision):
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.list_repo_files(name, revision=revision)
        present = [path for path in there if path != ".gitattributes"]
        if present and replaced is None:
            raise UserError(
                f"hf:{name} already contains {len(present)} files, such as {min(present)}: "
                "overwrite=true replaces its SAEs and its page, another name uploads elsewhere."
            )
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(
                path_in_repo=path, path_or_fileobj=str(file) if isinstance(file, Path) else file
            )
            for path, file in sorted(files.items())
        ]
        operations += [
            CommitOperationDelete(path_in_repo=path)
            for path in present
            if replaced is not None and replaced(path) and path not in files
        ]
        api.create_commit(name, operations=operations, commit_message=message, revision=revision)
    return str(address)


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn an error of the Hub or the network into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        # parallel uploads wrap the error of one of them
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        asked = f"hf:{name}@{revision}" if revision else f"hf:{name}"
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(
                f"the Hub refused {asked} (status {cause.response.status_code}, "
                f"{type(cause).__name__}): check its name. What is private, gated or to be "
                "changed needs a token that may do so: `hf auth login`."
            ) from error
        offline = isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
        if offline or is_network_error(cause):
            raise UserError(
                f"the Hub cannot be reached for {asked}, and the cache does not hold its files: "
                "check the network (and HF_HUB_OFFLINE), or copy the files here and give their "
                "folder."
            ) from error
        raise
