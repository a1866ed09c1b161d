"""MkDocs hook: shows Markdown files from outside docs/ as pages of the site, and keeps every link working on both.

The pages link as files of the repository, so the links work on a code host. The site has other addresses, and this
hook rewrites each link to them. A link to a file that is no page becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "benchmarks/results/cpu-float32/README.md": "benchmarks/cpu-float32.md",
    "benchmarks/results/cpu-bfloat16/README.md": "benchmarks/cpu-bfloat16.md",
    "examples/sam_medical/README.md": "medical/index.md",
    "examples/sam_medical/results/glas/README.md": "medical/results-glas.md",
    "examples/sam_medical/results/ultrasound/README.md": "medical/results-ultrasound.md",
}
SOURCES = {site: source for source, site in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```[\s\S]*?^```$)", re.MULTILINE)
NOTE = re.compile(r"^<!-- ?(?:not run|setup):[\s\S]*?-->\n", re.MULTILINE)  # for tests/test_docs.py


def on_files(files, config):
    for source, site in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, site, content=text))
        for _, _, target in LINK.findall(text):
            image = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if image.suffix == ".png" and image.is_file():
                name = _site_name(image.relative_to(ROOT).as_posix())
                if name not in files.src_uris:
                    files.append(File.generated(config, name, abs_src_path=str(image)))
    return files


def on_page_markdown(markdown, page, config, files):
    site = page.file.src_uri
    source = SOURCES.get(site, f"docs/{site}")
    if site == "index.md":
        page.meta["hide"] = ["navigation"]  # where it would be a single line
    if site.startswith("medical/results-"):
        page.meta["hide"] = ["toc"]  # to make room for wide tables

    def rewritten(match: re.Match[str]) -> str:
        bang, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if f"{path}/README.md" in PAGES:
            path = f"{path}/README.md"
        name = _site_name(path)
        if name not in files.src_uris:
            assert (ROOT / path).exists(), f"{source} links to {target}, which is not there."
            return text
        relative = posixpath.relpath(name, posixpath.dirname(site) or ".")
        return f"{bang}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    markdown = NOTE.sub("", markdown)
    parts = FENCE.split(markdown)  # every other part is code
    return "".join(part if index % 2 else LINK.sub(rewritten, part) for index, part in enumerate(parts))


def _site_name(path: str) -> str:
    """The name on the site of a file in the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
