"""A browser for tests: Chromium from PATH, or the one that scripts/get_chromium.sh brings from the npm registry."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".browser"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW_TO_GET_ONE = "no Chromium: install it (apt-get install chromium), or run scripts/get_chromium.sh, which needs npm"


def chromium() -> Path | None:
    """Return an executable, or None."""
    on_path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if on_path is not None:
        return Path(on_path)
    fetched = FETCHED / "chromium"
    return fetched if fetched.is_file() else None


@contextmanager
def open_browser(executable: Path) -> Iterator[Browser]:
    """Start a browser without a sandbox, which a container's root cannot have, and without any network."""
    environment = {**os.environ, "LANG": "en_US.UTF-8"}
    if executable.parent == FETCHED:
        environment |= {"LD_LIBRARY_PATH": str(FETCHED / "lib"), "FONTCONFIG_PATH": str(FETCHED)}
    rules = "--host-resolver-rules=MAP * ~NOTFOUND"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", rules], env=environment
        )
        yield browser
        browser.close()
