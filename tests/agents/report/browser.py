"""A headless Chromium that opens a page, runs a script in it and returns what the script does."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Before the page's own scripts: collect whatever goes wrong.
_WATCH = """<script>window.problems = [];
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"]) {
  const told = (event) => problems.push(event.message ?? event.violatedDirective ?? kind);
  addEventListener(kind, told, true);
}
console.error = console.warn = (...words) => problems.push(words.join(" "));
</script>"""
_ASK = """<script>addEventListener("load", async () => {
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  let answer;
  try { answer = await (async () => { %s })(); } catch (error) { problems.push(String(error)); }
  const element = document.createElement("pre");
  element.id = "answer";
  element.textContent = JSON.stringify([answer ?? null, problems]);
  document.body.append(element);
});</script>"""


@functools.cache
def find_browser() -> str | None:
    """Return the path of a Chromium, or None where there is none."""
    home = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or "~/.cache/ms-playwright").expanduser()
    found = [path for name in NAMES if (path := shutil.which(name))]
    found += map(str, sorted(home.glob("chromium-*/chrome-linux*/chrome")))
    for path in found:  # on some systems the name only prints how to install it
        asked = subprocess.run([path, "--version"], capture_output=True, check=False)
        if asked.returncode == 0 and b"Chrom" in asked.stdout:
            return path
    return None


def run_in(
    page: Path, script: str, *, width: int = 1280, dark: bool = False
) -> tuple[Any, list[str]]:
    """Open a page and run the body of an async function in it.

    Returns:
        What the script returns, and the errors, warnings and blocked requests of the page.
    """
    browser = find_browser()
    assert browser is not None
    html = page.read_text(encoding="utf-8").replace("<head>", "<head>" + _WATCH, 1)
    copy = page.with_name(f"browser-{page.name}")
    copy.write_text(html.replace("</body>", _ASK % script + "</body>"), encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = (f"--window-size={width},900", "--virtual-time-budget=20000")
    command = [browser, *flags, scheme, *size, copy.resolve().as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    copy.unlink()
    found = re.search('<pre id="answer">(.*?)</pre>', dumped, re.DOTALL)
    assert found is not None, dumped[-500:]
    answer, problems = json.loads(unescape(found[1]))
    return answer, problems
