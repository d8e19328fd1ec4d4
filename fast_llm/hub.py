"""Downloads from the Hugging Face Hub, into its cache (HF_HOME)."""

from pathlib import Path

from fast_llm.errors import MissingPackage, UserError


def is_reachable() -> bool:
    """Whether a connection to the Hub can be made. Asked once; slow answers count as made."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # which library answers depends on the version of the client
        return type(error).__name__ not in ("ConnectError", "ConnectionError")
    return True


def why_unreachable() -> str:
    """Why the Hub is not asked."""
    from huggingface_hub import constants

    return (
        "HF_HUB_OFFLINE is set"
        if constants.HF_HUB_OFFLINE
        else (f"no connection to {constants.ENDPOINT}")
    )


def cache_folder(name: str) -> str:
    """The folder of a model in the cache."""
    return f"models--{name.partition('@')[0].replace('/', '--')}"


def cached(name: str, file: str) -> str | None:
    """The path of a model's file in the cache; None if it is not there."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, file)
    except (ImportError, ValueError):  # not the name of a model
        return None
    return found if isinstance(found, str) else None


def download(
    path: str,
    failure: type[UserError],
    *,
    allow: list[str] | None = None,
    ignore: list[str] | None = None,
) -> Path:
    """The folder of `path`, a repository's `organisation/name` or `organisation/name@revision`.

    `allow` and `ignore`: patterns of files to download or not. Raises MissingPackage without
    huggingface_hub, `failure` if the download fails.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackage(
            "huggingface_hub", f"{path} is not a local folder; downloading it from the Hub"
        ) from error
    name, _, revision = path.partition("@")
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=allow, ignore_patterns=ignore
            )
        )
    except Exception as error:  # the Hub's client, its connection and the disk each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise failure(
            f"{path}: not a local folder, and downloading it from the Hugging Face Hub failed:"
            f" {reason.rstrip('. ')}; check the name and the network, give a local folder, or for a"
            " gated model run `hf auth login`"
        ) from error
