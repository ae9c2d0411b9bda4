"""Pictures of the report for README.

    python -m tests.report.screenshots FOLDER DPO_REWARD DIVIDE_AND_CONQUER LLAVA_CRITIC

Takes them from the reports of three finished runs (`stream-engine run --demo --pipeline_name ...`).
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.report.conftest import BROWSERS
from tests.report.watched import entries_of

SIZE = {"width": 1366, "height": 860}


def main(folder: Path, dpo_reward: Path, divide_and_conquer: Path, llava_critic: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = next(found for name in BROWSERS if (found := shutil.which(name)))
    shots = [
        ("overview", dpo_reward, "index.html", "light"),
        ("overview-dark", dpo_reward, "index.html", "dark"),
        ("dpo_reward", dpo_reward, "pairs.html", "light"),
        ("dpo_reward-dark", dpo_reward, "pairs.html", "dark"),
        ("divide_and_conquer", divide_and_conquer, "pairs.html", "light"),
        ("llava_critic", llava_critic, f"pairs.html#pair={flip_of(llava_critic)}", "light"),
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, run, page, scheme in shots:
            context = browser.new_context(viewport=SIZE, color_scheme=scheme)
            opened = context.new_page()
            opened.goto(f"{(run / 'report').absolute().as_uri()}/{page}")
            opened.wait_for_selector(".sides, .figures")
            opened.wait_for_load_state("networkidle")
            if page == "pairs.html" and run is dpo_reward:
                opened.locator(".side.rejected .heat .down").first.hover()
            with Image.open(io.BytesIO(opened.screenshot())) as picture:
                picture.convert("RGB").quantize(256).save(folder / f"{name}.png", optimize=True)
            context.close()
        browser.close()


def flip_of(run: Path) -> str:
    """A pair of which the critic named one place in both orders, or the first."""
    entries = entries_of(run / "report")
    return next((one["id"] for one in entries.values() if one["is_flip"]), next(iter(entries)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
