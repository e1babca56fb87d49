"""Reports in a real browser, where one is installed: nothing is fetched, nothing complains, and a phone needs no sideways scrolling."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.report import write_report
from moesim.trace import TraceWriter, load_trace
from tests.capacity_cases import capacity_document, scaling_result
from tests.conftest import clustered_routing, tiny_model
from tests.test_report import EVIL, spoilt

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-default-apps", "--disable-sync", "--no-first-run", "--no-default-browser-check",
    "--allow-file-access-from-files",
)  # fmt: skip
PHONE = 400  # CSS pixels

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# A page that holds the report in a frame as wide as a phone, and writes what it sees there into its own text. Frames of local files
# may be looked into with --allow-file-access-from-files; the report itself holds no script.
FRAME = """<!doctype html><title>frame</title><iframe src="report.html" style="width:%dpx;height:800px;border:0"></iframe>
<pre id="seen"></pre><script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, root = page.documentElement, wide = event.target.contentWindow.innerWidth;
  const inside = element => element.closest(".scroll");
  const beyond = [...page.body.querySelectorAll("*")].filter(e => !inside(e) && e.getBoundingClientRect().right > wide + 1
    && getComputedStyle(e).position !== "absolute" && !e.closest("svg")).map(e => e.tagName + "." + e.className);
  const order = [...page.querySelectorAll("a[href], [tabindex], summary")].map(e => e.className || e.tagName);
  document.getElementById("seen").textContent = JSON.stringify({
    width: wide, scroll: root.scrollWidth, beyond: beyond.slice(0, 5), scripts: page.scripts.length, figures: page.querySelectorAll("svg").length,
    first: order[0], dark: getComputedStyle(page.body).backgroundColor, height: root.scrollHeight, text: page.body.innerText.length,
  });
};
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a capacity sweep with hostile names and of a scaling plan."""
    where = tmp_path_factory.mktemp("browser")
    model = tiny_model(experts=8)
    with TraceWriter(where / "trace", model, top_k=2, weights=False) as writer:
        writer.append(clustered_routing(model, 400), domain=np.where(np.arange(400) % 3 == 0, "prose", "code"), sequence=np.arange(400) // 20)
    document = capacity_document(load_trace(where / "trace"), where / "out")
    for case in document["sweep"]["cases"]:
        case["values"]["replicas"] = f"{case['values']['replicas']}{EVIL}"
    document["title"] = EVIL
    document["notes"] = spoilt(document["notes"])
    write_report([document, scaling_result()], where / "report.html", title=f"Capacity {EVIL}")
    return where


def browse(folder: Path, *options: str, page: str = "frame.html") -> subprocess.CompletedProcess[str]:
    command = [BROWSER, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *options, (folder / page).as_uri()]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=90, check=True)


def look(folder: Path, *options: str) -> dict[str, Any]:
    (folder / "frame.html").write_text(FRAME % PHONE)
    dom = browse(folder, "--window-size=1000,900", "--dump-dom", *options).stdout
    seen: dict[str, Any] = json.loads(
        re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[0].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    )
    return seen


def test_a_phone_shows_the_whole_page_without_sideways_scrolling_and_nothing_runs_in_it(folder: Path) -> None:
    seen = look(folder)
    assert seen["width"] == PHONE
    assert seen["scroll"] <= PHONE, seen
    assert seen["beyond"] == []
    assert seen["scripts"] == 0
    assert seen["figures"] >= 8
    assert seen["first"] == "skip", "the first stop of the keyboard is the way past the header"
    assert seen["text"] > 3000


def test_dark_and_light_differ(folder: Path) -> None:
    colours = {look(folder, f"--blink-settings=preferredColorScheme={scheme}")["dark"] for scheme in (0, 1)}
    assert len(colours) == 2


def asked_for(log: Path) -> set[str]:
    """Addresses a page asked for; what the browser asks on its own behalf has no origin."""
    events = json.loads(log.read_text())["events"]
    return {
        params["url"]
        for event in events
        if (params := event.get("params", {})).get("initiator", "not an origin") != "not an origin" and params.get("url", "").startswith("http")
    }


def test_the_browser_has_no_complaint_and_asks_nobody_for_anything(folder: Path) -> None:
    log = folder / "net.json"
    options = ("--enable-logging=stderr", f"--log-net-log={log}", f"--screenshot={folder / 'page.png'}", "--window-size=1200,3000")
    shown = browse(folder, *options, page="report.html")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert asked_for(log) == set()
    assert (folder / "page.png").stat().st_size > 20_000
    (folder / "planted.html").write_text('<img src="http://planted.invalid/x.png"><script>console.error("planted")</script>')
    planted = browse(folder, *options, page="planted.html")
    assert "planted" in planted.stderr
    assert asked_for(log) == {"http://planted.invalid/x.png"}, "the check would not see a request"


def test_it_prints(folder: Path) -> None:
    browse(folder, "--no-pdf-header-footer", f"--print-to-pdf={folder / 'page.pdf'}", page="report.html")
    data = (folder / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 40
