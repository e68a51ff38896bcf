"""Decides before a run whether Weights & Biases can be logged to online; otherwise its files are kept, to be sent later.

It imports the standard library only. What wandb itself would do later is a traceback, where there is no API key, or a silence of 90 s,
where its server does not answer.
"""

import configparser
import netrc
import os
import ssl
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

ANSWER_SECONDS = 20.0  # how long the server may take to answer
QUICK_SECONDS = 2.0  # after so many it is said what is waited for


def settle_mode(folder: Path) -> None:
    """Set WANDB_MODE=offline in this process, and say why, where there is no API key or the server does not answer.

    `folder` is the run's. A mode that the user has set (WANDB_MODE, `wandb offline`) stays.
    """
    if _setting("mode", "online") != "online" or _setting("disabled", "false") == "true":
        return
    server = _setting("base_url", "https://api.wandb.ai").rstrip("/")
    if not _has_key(server):
        why = f"there is no API key for {server} (wandb login or WANDB_API_KEY sets one)"
    elif not _answers(server):
        why = f"{server} does not answer"
    else:
        return
    os.environ["WANDB_MODE"] = "offline"
    print(f"note: {why}: Weights & Biases keeps this run offline. {how_to_send(folder)}", flush=True)


def how_to_send(folder: Path) -> str:
    """Return how the user sends what a run has logged offline."""
    return f"Send it later: wandb sync {folder}/wandb/offline-run-*"


def _setting(name: str, default: str) -> str:
    """Return one of wandb's settings: WANDB_NAME of the environment, else from its files, of which the working directory's wins."""
    if value := os.environ.get(f"WANDB_{name.upper()}"):
        return value
    place = Path(os.environ.get("WANDB_CONFIG_DIR") or Path(os.path.expanduser("~/.config/wandb")))
    file = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        file.read([place / "settings", Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"], encoding="utf-8")
    except (configparser.Error, OSError, UnicodeError):  # wandb will say so
        return default
    return file.get("default", name, fallback=default)


def _has_key(server: str) -> bool:
    """Whether wandb would find an API key, or an identity token, for a server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _setting("api_key", ""):
        return True
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else [os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    for name in names:
        try:
            found = netrc.netrc(name).authenticators(urlsplit(server).netloc)
        except (netrc.NetrcParseError, OSError):
            continue
        if found and found[2]:
            return True
    return False


def _answers(server: str) -> bool:
    """Whether a server answers, whatever it says, within ANSWER_SECONDS."""
    answered = threading.Event()

    def ask() -> None:
        """Note an answer; a thread does it, as no time limit applies to the look-up of a name."""
        try:
            urllib.request.urlopen(f"{server}/healthz", timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # wandb may know another certificate
                return
        except (OSError, HTTPException, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, name="wandb", daemon=True)
    thread.start()
    thread.join(QUICK_SECONDS)
    if thread.is_alive():
        print(f"note: waiting for an answer of Weights & Biases at {server}, for at most {ANSWER_SECONDS:.0f} s", flush=True)
        thread.join(ANSWER_SECONDS - QUICK_SECONDS)
    return answered.is_set()
