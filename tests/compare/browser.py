"""Headless Chromium, where there is one: screenshots, what elements measure, what the console says."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--enable-logging=stderr",
)
# Chromium's own numbers for what the reader's system prefers.
SCHEMES = {"dark": 0, "light": 1}

# Inside a frame a page has the frame's width, and its own scripts stay forbidden.
MEASURE = """<!DOCTYPE html><body>
<iframe id="page" src="{page}" style="width:{width}px;height:2000px;border:0"></iframe>
<script>onload = () => {{
  const inner = document.getElementById("page").contentDocument, root = inner.documentElement;
  const box = one => one.getBoundingClientRect();
  const wide = [...inner.querySelectorAll("body *")].filter(
    one => box(one).right > {width} + 0.5 && !one.closest("svg") && !one.closest("thead"));
  const shown = [...inner.querySelectorAll("figure svg")].filter(one => box(one).width > 0);
  document.body.textContent = JSON.stringify({{scroll: root.scrollWidth, height: root.scrollHeight,
    wide: wide.map(one => one.outerHTML.slice(0, 120)), figures: shown.length,
    narrowest: Math.min(...shown.map(one => box(one).width / one.viewBox.baseVal.width))}});
}}</script>"""


def find_browser() -> str | None:
    """Path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def run(browser: str, home: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Show a page with these flags; `home` becomes the browser's own new folder."""
    command = [browser, *FLAGS, f"--user-data-dir={home}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What pages wrote to the console: errors, and what their policy has blocked."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measure(browser: str, home: Path, page: Path, width: int) -> dict[str, Any]:
    """What a page measures in a frame of this width in pixels."""
    outer = page.with_name(f"measure-{width}.html")
    outer.write_text(MEASURE.format(page=page.name, width=width), encoding="utf-8")
    done = run(
        browser, home, outer, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"
    )
    outer.unlink()
    assert not console(done), console(done)
    found: dict[str, Any] = json.loads(
        done.stdout.partition("<body>")[2].partition("</body>")[0].replace("&gt;", ">").replace("&lt;", "<")
    )
    return found
