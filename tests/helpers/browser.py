"""A page in headless Chromium: what a script finds in it, what it asks the network for, and what it complains of."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--dump-dom"]
# Within a frame, since windows are not as narrow as a telephone. The policy refuses all but data within the page.
PAGE = """<!DOCTYPE html><iframe width="{width}" height="900" style="border: 0" srcdoc="{text}"></iframe>
<script>
onload = () => {{ document.body.textContent = JSON.stringify(frames[0].answer()); }};
</script>"""
HEAD = """<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>
const asked = [], complaints = [];
addEventListener("securitypolicyviolation", event => asked.push(event.blockedURI));
addEventListener("error", event => complaints.push(event.message));
for (const kind of ["error", "warn", "log"]) console[kind] = text => complaints.push(text);
const all = name => Array.from(document.querySelectorAll(name));
function answer() {{ return {{ found: (() => {{ {script} }})(), asked, complaints }}; }}
</script>"""


def ask(path: Path, profile: Path, width: int, script: str) -> Any:
    """Return what a script gives in a page of this width; assert that the page asks for nothing and says nothing.

    The script has `all(SELECTOR)`, the elements of a kind.
    """
    answer = answer_of(path, profile, width, script)
    assert (answer["asked"], answer["complaints"]) == ([], [])
    return answer["found"]


def answer_of(path: Path, profile: Path, width: int, script: str) -> Any:
    assert CHROMIUM is not None
    profile.mkdir(parents=True, exist_ok=True)
    text = re.sub("(<head>|^)", lambda tag: tag[0] + HEAD.format(script=script), path.read_text(), count=1)
    framed = profile / "framed.html"
    framed.write_text(PAGE.format(width=width, text=html.escape(text)))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width + 50},1000", framed.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<body>(.*)</body>", result.stdout, re.DOTALL)
    assert found, result.stderr
    return json.loads(html.unescape(found[1]))
