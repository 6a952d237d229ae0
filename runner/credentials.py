"""Credentials: the user's Hub token and endpoint, and the redaction of every secret from output."""

import os
import re
from pathlib import Path

PUBLIC_HUB = "https://huggingface.co"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
NOTIFY = "STOCKPOT_NOTIFY"  # addresses of notices, separated by spaces
SHORTEST = 8  # characters of a secret; shorter values are words such as "true"
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")  # user:password@


def redact(text: str) -> str:
    """`text` with every secret of the environment, the Hub token, and every password in an address replaced by ***."""
    values = set(os.environ.get(NOTIFY, "").split())
    values |= {value.strip() for name, value in os.environ.items() if SECRET_NAME.search(name)} | {token() or ""}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return IN_ADDRESS.sub("***@", text)


def endpoint() -> str:
    """The Hub that HF_ENDPOINT names, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")


def token() -> str | None:
    """The user's Hub token, as `huggingface_hub` finds it: HF_TOKEN, else the file that `hf auth login` writes."""
    if secret := os.environ.get("HF_TOKEN", "").strip():
        return secret
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    path = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
