"""A folder that anequant wrote goes to the Hugging Face Hub; what would go there is told first.

The token is the one of huggingface_hub's own login (`hf auth login`, or its HF_TOKEN); it is not looked at
here. `upload_folder` takes up an upload that was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anequant.checkpoints.manifest import MANIFEST
from anequant.errors import InputError, ResourceError, UsageError, first_line, quote
from anequant.jobs.control import Progress, silent
from anequant.verification.files import verify_files


@dataclass(frozen=True)
class Upload:
    """What goes to the hub's repository `repo`: `files` are sizes in bytes by path.

    `kind` is the folder's. `url` is where it went, None as long as nothing was sent.
    """

    repo: str
    private: bool
    kind: str
    files: Mapping[str, int]
    url: str | None = None

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def plan_upload(folder: Path, repo: str, *, private: bool = False, progress: Progress = silent) -> Upload:
    """Return what `push` would send, without asking anything of the network.

    Raises InputError for a folder that anequant did not write, VerificationError for one that has changed
    since, UsageError for a name that the hub would refuse.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        remedy = "use your name or an organisation's, a slash and a name: org/name"
        raise UsageError(f"{quote(repo)} is no name of a repository", remedy=remedy) from error
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"'{folder}' holds no {MANIFEST}, anequant did not write it",
            remedy="name an output of convert, quantize, rotate or lower",
        )
    progress("hashes", 0.0)
    recorded = verify_files(folder)
    names = sorted([*recorded["files"], MANIFEST])
    return Upload(repo, private, recorded["kind"], {name: (folder / name).stat().st_size for name in names})


def push(folder: Path, upload: Upload, progress: Progress = silent) -> Upload:
    """Send what `plan_upload` found; the repository is made if there is none.

    Raises UsageError when it exists and is not as private as `upload` says, ResourceError when the hub cannot
    be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api = HfApi()
    try:
        progress("repository", 0.1)
        url = api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        if bool(api.repo_info(url.repo_id).private) != upload.private:
            is_, wanted = ("public", "--private") if upload.private else ("private", "no --private")
            raise UsageError(
                f"'{url.repo_id}' exists on the hub and is {is_}, the command says {wanted}",
                remedy="name another repository, or say what it is",
            )
        progress(f"{len(upload.files)} files", 0.2)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=list(upload.files),
            commit_message=f"Upload {upload.kind} made by anequant",
        )
    except (hub.HTTPError, hub.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        reason = first_line(error)
        raise ResourceError(
            f"'{upload.repo}' could not be written on the hub: {reason}",
            remedy="log in (hf auth login), check name and network; the same command then goes on",
        ) from error
    return replace(upload, repo=url.repo_id, url=str(url))
