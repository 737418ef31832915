"""Figures of the gallery: ours belong to no pyplot, so they are found by what a script calls them."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figure that a block has made and called ``figure``; return the text that shows it."""
    found = block_vars["example_globals"].pop("figure", None)
    if not isinstance(found, Figure):
        return ""
    path = next(block_vars["image_path_iterator"])
    found.savefig(path, dpi=90)
    return figure_rst([path], gallery_conf["src_dir"])


def _get_sg_image_scraper() -> Any:
    """Return the scraper, by the name that sphinx-gallery looks for: its configuration is to be stored."""
    return scrape
