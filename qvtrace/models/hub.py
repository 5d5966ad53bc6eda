"""The Hugging Face hub, before anything is asked of it."""

_PATIENCE = 3.0  # seconds, for a connection to each of its addresses, and for an answer

# What httpx and requests call having no connection; a proxy that refuses has other names.
_NO_CONNECTION = frozenset({"ConnectError", "ConnectTimeout", "ConnectionError"})


def hub_address() -> str:
    """Where the hub is, as `HF_ENDPOINT` says."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_reachable() -> bool:
    """Whether a connection to the hub can be made, through the proxies that are set.

    For a file that is not cached, huggingface_hub tries again and again: 23 seconds where there is
    no network, minutes where a firewall is silent. A hub that answers late, or with an error, is
    reachable, and so is one that `HF_HUB_OFFLINE` keeps huggingface_hub from asking: it tells by
    itself what comes of that.
    """
    from huggingface_hub import get_session

    try:
        get_session().head(hub_address(), timeout=_PATIENCE)
    except Exception as error:
        return type(error).__name__ not in _NO_CONNECTION
    return True
