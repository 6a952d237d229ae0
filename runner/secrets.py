"""What must never be written down: tokens and keys of the user, found where programs look for them."""

import os
import re

from runner import hub

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
NOTIFY = "STOCKPOT_NOTIFY"  # addresses of notices, separated by spaces
SHORTEST = 8  # characters; shorter values of such variables are words such as "true", which may stand anywhere
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")  # user:password@


def redact(text: str) -> str:
    """`text` with every secret of the environment, the token of the Hub, and every password in an address as ***."""
    values = set(os.environ.get(NOTIFY, "").split())
    values |= {value.strip() for name, value in os.environ.items() if SECRET_NAME.search(name)} | {hub.token() or ""}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return IN_ADDRESS.sub("***@", text)
