"""Train two short runs of the demo and take the pictures of docs/report.md: `scripts/report_pictures.py [RUN OTHER]`.

Needs the demo's model and data (`make demo` makes them), Chromium, and about ten minutes on two CPU cores. With two run
folders it trains nothing and takes their pictures.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser  # noqa: E402

from qlora_train.report.write_report import write_comparison, write_report  # noqa: E402
from tests.support.browser import HOW_TO_GET_ONE, chromium, open_browser  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MAX_IMAGE_BYTES = 200_000
NUM_TRAIN_ROWS, NUM_EVAL_ROWS = 600, 60
SETTINGS = (
    "data.train=runs/pictures/train.jsonl", "data.eval=runs/pictures/heldout.jsonl", "train.max_steps=60",
    "train.eval_steps=10", "train.logging_steps=2",
)  # fmt: skip
RUNS = {"60-steps": (), "20-steps": ("train.max_steps=20", "export.merge=false")}
"""Names of the runs, with their settings beside SETTINGS."""


@dataclass(frozen=True)
class Picture:
    """A picture: its page, the size of the browser's window, and where the page is scrolled to."""

    name: str
    page: str
    width: int
    height: int
    scheme: str = "light"
    section: str = ""


PICTURES = (
    Picture("report-desktop", "report", 1280, 1160),
    Picture("report-dark", "report", 1280, 1000, scheme="dark", section="answers"),
    Picture("report-phone", "report", 390, 844),
    Picture("report-compare", "comparison", 1280, 1160, section="results"),
)


def main() -> None:
    executable = chromium()
    if executable is None:
        raise SystemExit(HOW_TO_GET_ONE)
    folders = [Path(name) for name in sys.argv[1:]] or [train(name, settings) for name, settings in RUNS.items()]
    with tempfile.TemporaryDirectory() as temporary, open_browser(executable) as browser:
        pages = {
            "report": write_report(folders[0], Path(temporary) / "report.html"),
            "comparison": write_comparison(folders, Path(temporary) / "comparison.html"),
        }
        for picture in PICTURES:
            take(browser, picture, pages[picture.page])


def train(name: str, settings: tuple[str, ...]) -> Path:
    """Train and evaluate a run; return its folder, as a path from the root of the repository."""
    folder = Path("runs", "pictures", name)
    if not (ROOT / folder / "answers.jsonl").is_file():
        for file, count in (("train", NUM_TRAIN_ROWS), ("heldout", NUM_EVAL_ROWS)):
            lines = (ROOT / ".demo" / "addresses" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            shortened = ROOT / "runs" / "pictures" / f"{file}.jsonl"
            shortened.parent.mkdir(parents=True, exist_ok=True)
            shortened.write_text("\n".join(lines) + "\n", encoding="utf-8")
        qlora_train("configs/demo.yaml", *SETTINGS, *settings, f"run.output_dir={folder}")
        qlora_train("eval", str(folder), "--max-new-tokens", "96")
    return folder


def qlora_train(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "qlora_train.cli.main", *words], cwd=ROOT, check=True)


def take(browser: Browser, picture: Picture, page_file: Path) -> None:
    """Save a picture of a page."""
    page = browser.new_page(
        viewport={"width": picture.width, "height": picture.height}, color_scheme=picture.scheme,  # type: ignore[arg-type]
    )  # fmt: skip
    page.goto(page_file.as_uri() + (f"#{picture.section}" if picture.section else ""))
    page.wait_for_timeout(500)
    file = IMAGES / f"{picture.name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=file)
    page.close()
    size = file.stat().st_size
    assert size < MAX_IMAGE_BYTES, f"{file}: {size} bytes"
    print(f"{file.relative_to(ROOT)}: {size // 1000} kB")


if __name__ == "__main__":
    main()
