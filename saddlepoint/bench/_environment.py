"""Environments of their own for the tools that stand beside ours, because each pins what it needs."""

import os
import subprocess
import time
import venv
from collections.abc import Callable

from platformdirs import user_cache_path

from saddlepoint.errors import SaddlepointError


def environment(peer: str, *more: str, say: Callable[[str], None] = print) -> str:
    """The interpreter of an environment that holds a peer, such as "garak==0.17.1", made the first time and kept for the next.

    Args:
        more: What is installed with it, such as "torch==2.13.0".

    Raises:
        SaddlepointError: It cannot be installed.
    """
    place = user_cache_path("saddlepoint") / "environments" / peer.replace("==", "-")
    python = place / "bin" / "python"
    if not (place / "complete").is_file():
        say(f"making an environment for {peer} in {place}; once, some minutes")
        began = time.monotonic()
        venv.create(place, with_pip=True, clear=True)
        # pip alone takes over 20 minutes to find out which versions of garak's 170 packages go together; uv takes seconds.
        links = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
        for wanted in (["pip", "install", "--quiet", "uv"], ["uv", "pip", "install", "--quiet", "--python", str(python), peer, *more]):
            done = subprocess.run([python, "-m", *wanted], capture_output=True, text=True, env=links)
            if done.returncode:
                said = (done.stderr.strip() or "it does not say why").splitlines()[-1]
                raise SaddlepointError(f"{peer} cannot be installed: {said}; it needs the package index once")
        (place / "complete").write_text(f"{time.monotonic() - began:.0f} s\n")
    return str(python)
