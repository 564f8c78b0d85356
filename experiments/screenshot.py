"""Looks at a report in headless Chromium, as on a phone and on a desk, light and dark.

Needs `pip install playwright` and a Chromium: the system's (`apt-get install chromium`), or that of
`playwright install chromium`.

    python experiments/screenshot.py runs/glue/report.html --out screenshots

Leaves a picture of the top of the page and one of the whole for each of the four, and says what it found: whether the
page itself scrolls sideways, what it wanted to load, and errors of its script. The exit status is 1 if there is any.
"""

import argparse
import shutil
import sys
from pathlib import Path

VIEWS = {"phone": (360, 800), "desk": (1280, 900)}


def look(file: Path, out: Path | None = None) -> list[str]:
    """What is wrong with the page, in words; the pictures are written to `out`.

    Every head of the first table is clicked too.
    """
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports] - installed by whoever looks

    wrong = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        for view in VIEWS:
            for scheme in ("light", "dark"):
                wrong += [
                    f"{view}, {scheme}: {text}" for text in _view(browser, file.resolve().as_uri(), view, scheme, out)
                ]
        browser.close()
    return wrong


def _view(browser, url: str, view: str, scheme: str, out: Path | None) -> list[str]:
    wrong: list[str] = []
    width, height = VIEWS[view]
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab.on("request", lambda r: None if r.url == url else wrong.append(f"loads {r.url}"))
    tab.on("pageerror", lambda e: wrong.append(f"script: {e}"))
    tab.goto(url)
    wide = tab.evaluate("document.documentElement.scrollWidth")
    if wide > width:
        wrong.append(f"{wide} pixels wide, the window {width}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=out / f"{view}-{scheme}.png")
        tab.screenshot(path=out / f"{view}-{scheme}-whole.png", full_page=True)
    wrong += _sorting(tab)
    tab.close()
    return wrong


def _sorting(tab) -> list[str]:
    """Each head of the first table is clicked: no row may get lost, and the numbers must fall."""
    return tab.evaluate("""() => {
      const table = document.querySelector("table"), body = table.tBodies[0], wrong = [], n = body.rows.length;
      for (const button of table.querySelectorAll("th button")) {
        button.click();
        const column = button.parentNode.cellIndex;
        const values = [...body.rows].map(row => row.cells[column].dataset.value).filter(v => v !== "");
        const falls = values.every((v, i) => !i || isNaN(v) || Number(values[i - 1]) >= Number(v));
        if (body.rows.length !== n || !falls) wrong.push(`sorting by column ${column} gives ${values}`);
      }
      return wrong;
    }""")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    args = parser.parse_args()
    wrong = look(args.page, args.out)
    print(*(wrong or [f"{args.page}: nothing wrong; look at {args.out}"]), sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
