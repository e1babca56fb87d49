"""Plain text of manual pages that Debian packages installed: the files of a package, and a page without its roff markup."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

from moesim.errors import InputError

_FONT = re.compile(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[+-]?\d+|\\[&|^,/%:c]|\\m\[[^]]*\]")
_NAMED = re.compile(r"\\\((..)|\\\[([^]]+)\]")
_MACRO = re.compile(r"[.']\s*([A-Za-z]+)\s*(.*)")
_SIGNS = {"aq": "'", "dq": '"', "lq": "“", "rq": "”", "co": "©", "en": "–", "em": "—", "hy": "-", "mi": "-", "bu": "•", "ha": "^", "ti": "~"}
_WORDS = {"SH", "SS", "Sh", "Ss", "B", "I", "SM"}  # arguments are words
_GLUED = {"BR", "RB", "BI", "IB", "IR", "RI"}  # arguments alternate fonts inside a word


def page_files(package: str) -> list[Path]:
    """Manual pages of an installed Debian package, links left out; InputError naming the package when it is missing."""
    found = Path(f"/var/lib/dpkg/info/{package}.list")
    names = found.read_text().split("\n") if found.exists() else []
    pages = [path for name in names if "/man/" in name and name.endswith(".gz") and (path := Path(name)).is_file() and not path.is_symlink()]
    if not pages:
        raise InputError(f"no manual pages of the Debian package {package!r} are installed; run: apt-get install {package}")
    return pages


def installed_version(package: str) -> str:
    """Version dpkg knows of a package; InputError when there is no dpkg or no such package."""
    tool = shutil.which("dpkg-query")
    done = subprocess.run([tool, "-W", "-f=${Version}", package], capture_output=True, text=True, check=False) if tool else None
    if done is None or done.returncode:
        raise InputError(f"the Debian package {package!r} is not installed; run: apt-get install {package}")
    return done.stdout


def page_text(path: Path) -> str:
    """Prose of one compressed page: no comments, no displayed code, no markup."""
    with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as stream:
        return plain(stream.read())


def plain(roff: str) -> str:
    """Text of roff source. Displays between .nf/.EX and .fi/.EE are code and left out, as are macros without words."""
    lines, display = [], False
    for line in roff.split("\n"):
        if line[:1] not in {".", "'"}:
            if not display:
                lines.append(_bare(line))
            continue
        macro = _MACRO.match(line)
        if not macro:
            continue
        name, rest = macro.groups()
        if name in {"nf", "EX", "fi", "EE"}:
            display = name in {"nf", "EX"}
        elif not display and name in _WORDS | _GLUED:
            words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', rest)]
            lines.append(_bare(("" if name in _GLUED else " ").join(words)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _bare(text: str) -> str:
    text = re.sub(r'\\".*', "", text)
    text = _FONT.sub("", text)
    text = _NAMED.sub(lambda sign: _SIGNS.get(sign[1] or sign[2], ""), text)
    return text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\e", "\\")
