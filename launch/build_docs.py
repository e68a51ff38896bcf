"""Builds the documentation's site; `bash launch/docs.sh` calls it in an environment with zensical.

    python launch/build_docs.py [FOLDER]       writes the site's pages to FOLDER, by default site/

The site holds README.md as its first page, docs/, and some files from elsewhere in the repository (ELSEWHERE). Links in the sources are
those of the repository, so that they work where the files are read there, too; here they become links between pages. docs/recipes.md has a
table of all keys, which is written anew from posttrain/recipes/keys.py. A dead link, be it to a page, a heading or a picture, is an error.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from posttrain.recipes.keys import ANY_TIME, BY_EXTEND, SAME_CONTENT, DPORecipe, Recipe, SFTRecipe  # noqa: E402
from posttrain.recipes.reading import readers  # noqa: E402

ELSEWHERE = {  # files and folders of the repository that are in the site, and where
    "README.md": "index.md",
    "docs": ".",
    "ds_configs/README.md": "sharding.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results": "results",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")  # of Markdown, to a file of the repository
MARKS = "<!-- from posttrain/recipes/keys.py by launch/docs.sh -->", "<!-- end -->"
CHANGES = {ANY_TIME: "yes", BY_EXTEND: "with `--extend`", SAME_CONTENT: "to a path of the same content"}


def pages(root: Path) -> dict[Path, str]:
    """Return every file of the site, by its place in the repository: its name in the site."""
    found = {}
    for source, target in ELSEWHERE.items():
        files = [root / source] if (root / source).is_file() else sorted(p for p in (root / source).rglob("*") if p.is_file())
        for path in files:
            found[path] = target if path == root / source else os.path.normpath(f"{target}/{path.relative_to(root / source)}")
    return found


def staged(root: Path, folder: Path) -> list[str]:
    """Copy the site's sources to `folder`, with links between its pages; returns dead links as PAGE: LINK."""
    files, dead = pages(root), []
    for source, target in files.items():
        place = folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(source, place)
            continue

        def of_the_site(link: re.Match, source=source) -> str:
            file = Path(os.path.normpath(source.parent / unquote(link[1])))
            if file not in files:
                dead.append(f"{source.relative_to(root)}: {link[1]}")
                return link[1]
            return files[file]

        place.write_text(LINK.sub(of_the_site, source.read_text(encoding="utf-8")), encoding="utf-8")
    return dead


class Page(HTMLParser):
    """What a page of HTML has that can be linked to, and what it links to."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Collect ids, and links to what is not on another server."""
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        links = [given[name] for name in ("href", "src") if given.get(name)]
        self.links += [link for link in links if not urlsplit(link).scheme and not urlsplit(link).netloc]


def dead_links(site: Path) -> list[str]:
    """Return the links of a folder of HTML to files or headings that it does not have, as PAGE: LINK."""
    parsed = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in parsed.items():
        for link in page.links:
            name, anchor = urldefrag(link)
            base = site if name.startswith("/") else path.parent
            file = Path(os.path.normpath(base / unquote(name).lstrip("/").partition("?")[0])) if name else path
            file = file / "index.html" if file.is_dir() else file
            is_there = unquote(anchor) in parsed[file].anchors if file in parsed else file.is_file()
            if not is_there and path.name != "404.html":  # whose links begin at the root of a server
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def keys_table(kind: type[Recipe], names: list[str]) -> list[str]:
    """Return a Markdown table of these keys: their names, meaning, values if a recipe does not set them, and whether they may change."""
    lines = ["| key | meaning | default | may change in a run |", "|---|---|---|---|"]
    for name in names:
        field = kind.model_fields[name]
        default = "required" if field.is_required() else f"`{field.default}`"
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
        meaning += f". One of {', '.join(f'`{choice}`' for choice in choices)}" if choices else ""
        meaning += f". Only with loss {', '.join(readers()[name])}".replace("_", "\\_") if kind is DPORecipe and name in readers() else ""
        lines.append(f"| `{name}` | {meaning} | {default} | {CHANGES.get(field.json_schema_extra['changes'], 'no')} |")
    return lines


def all_keys() -> str:
    """Return the tables of docs/recipes.md: the keys that SFT and DPO share, and those of each."""
    shared = [name for name in SFTRecipe.model_fields if name in Recipe.model_fields]
    lines = ["### Keys of both", "", *keys_table(SFTRecipe, shared)]
    for title, kind in (("SFT", SFTRecipe), ("DPO", DPORecipe)):
        own = [
            name for name in kind.model_fields if name not in shared or kind.model_fields[name].default != Recipe.model_fields[name].default
        ]
        lines += ["", f"### Keys of {title}", "", *keys_table(kind, own)]
    return "\n".join(lines)


def with_all_keys(text: str) -> str:
    """Return docs/recipes.md with the tables of the keys as they are now."""
    begin, end = MARKS
    before, rest = text.split(begin)
    return f"{before}{begin}\n{all_keys()}\n{end}{rest.split(end)[1]}"


def build(root: Path, target: Path) -> list[str]:
    """Write the site into the folder `target`, which it replaces; returns dead links, in which case it is not written."""
    with tempfile.TemporaryDirectory(prefix="posttrain_docs_") as folder:
        work = Path(folder)
        shutil.copyfile(root / "zensical.toml", work / "zensical.toml")
        if dead := staged(root, work / "docs"):
            return dead
        built = subprocess.run([sys.executable, "-m", "zensical", "build"], cwd=work, capture_output=True, text=True)
        if built.returncode or not (work / "site" / "index.html").is_file():
            raise ValueError(f"zensical cannot build the site: {built.stdout}{built.stderr}")
        if dead := dead_links(work / "site"):
            return dead
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(work / "site", target)
    return []


def main() -> None:
    """Write the table of the keys and the site, or say what is wrong."""
    recipes = ROOT / "docs" / "recipes.md"
    recipes.write_text(with_all_keys(recipes.read_text(encoding="utf-8")), encoding="utf-8")
    target = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "site"
    if dead := build(ROOT, target):
        sys.exit("dead links:\n    " + "\n    ".join(dead))
    print(f"the site is in {target}: python -m http.server -d {target} shows it, with its search, at http://localhost:8000")


if __name__ == "__main__":
    main()
