"""MkDocs hook: shows Markdown files from outside docs/ and notebooks as pages of the site, and keeps links working.

The pages link as files of the repository, so the links work on a code host. The site has other addresses, and this
hook rewrites each link to them. A link to a file that is no page becomes plain text.
"""

from __future__ import annotations

import base64
import json
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
NOTEBOOKS = {
    f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in ROOT.glob("docs/notebooks/*.ipynb")
}
PAGES |= NOTEBOOKS
SOURCES = {site: source for source, site in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```[\s\S]*?^```$)", re.MULTILINE)
NOTE = re.compile(r"^<!-- ?(?:not run|setup):[\s\S]*?-->\n", re.MULTILINE)  # for tests/test_docs.py


def on_files(files, config):
    for source, site in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source in NOTEBOOKS:
            text, pictures = _notebook_page(json.loads(text), posixpath.basename(site).removesuffix(".md"))
            for name, content in pictures.items():
                files.append(File.generated(config, f"notebooks/{name}", content=content))
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


def _notebook_page(notebook: dict, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the pictures that its cells have made, by name."""
    name = f"{stem}.ipynb"
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        language = "bash" if source.startswith("%%bash\n") else "python"
        source = source.removeprefix("%%bash\n")
        parts.append(f"```{language}\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{stem}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f'<img src="{picture}" alt="output of the cell above">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip("\n"):
                parts.append(f"```{{.text .output}}\n{text}\n```")
    parts.insert(1, f'This page is the notebook <a href="{name}" download>{name}</a>, with the outputs of a run.')
    return "\n\n".join(parts) + "\n", pictures


def _site_name(path: str) -> str:
    """The name on the site of a file in the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
