"""The process that uploads one export to the Hugging Face Hub.

It is separate so that nothing in the Hub's client delays a step or ends a run, and so that it can
be ended at any time. Input: one line of JSON with `repo`, `private`, and, to upload, `folder` and
`message`; the end of the input ends the process. Output: one line of JSON with `commit`, the
address of what was uploaded ("" without a folder), or `problem`.
"""

import json
import os
import sys
import threading
from typing import Any

# Of the weights that an earlier export may have had; nothing else in the repository is deleted.
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def upload(repo: str, private: bool, folder: str | None = None, message: str = "") -> str:
    """Create the repository if it is missing, and upload the folder as one commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise ValueError(
            f"{repo} is public, but training.export.push_to_hub.private is yes: make it private on"
            " the Hub, or set private: no"
        )
    if folder is None:
        return ""
    commit = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=_WEIGHTS
    )
    return str(commit.commit_url)


def main() -> None:
    """Do what the line of the input asks for, unless the input ends before."""
    arguments: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        found = {"commit": upload(**arguments)}
    except Exception as error:  # the client, its connection and the disk each raise their own
        text = " ".join(str(error).split()) or type(error).__name__
        found = {"problem": text[:500].rstrip(".")}
    print(json.dumps(found), file=sys.__stdout__, flush=True)


def _end_with_input() -> None:
    """The training process has ended, or no longer needs the upload."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
