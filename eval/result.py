"""Results of evaluations: entries of a JSON file as a dictionary, with a data frame and the page that shows them."""

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sae.extras import needs
from ..sae.files import read_text

if TYPE_CHECKING:
    import pandas

# Entries of notebooks' tables.
SHOWN = 40


class Report(dict[str, Any]):
    """A JSON document, as it is written to its file; the metrics define its keys.

    >>> report = Report({"fvu": 0.1, "page_path": "runs/topk/report.html"})
    >>> report["fvu"], report.page.name
    (0.1, 'report.html')

    Args:
        entries: The document.
        rows: What a data frame has rows of: mappings, or a file of JSON lines. Default: one row, of the scalar entries.
    """

    def __init__(self, entries: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] | Path | None = None):
        super().__init__(entries)
        self._rows = rows

    @property
    def page(self) -> Path:
        """The page's file.

        Raises:
            ValueError: If none was written.
        """
        path = self.get("page_path") or self.get("report_path")
        if path is None:
            raise ValueError("page: expected a result with a page, got one without. Render its JSON: sparsary.render(FILE).")
        return Path(path)

    @property
    def html(self) -> str:
        """The page itself.

        Raises:
            ValueError: If none was written.
        """
        return read_text(self.page)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table: a row for each latent, circuit or run where there are several, else one row of the scalar entries.

        Nested entries have dotted columns. Needs pandas.
        """
        with needs("to_pandas"):
            import pandas

        if isinstance(self._rows, Path):
            rows = [json.loads(line) for line in self._rows.read_text(encoding="utf-8").splitlines()]
        else:
            rows = self._rows or [{key: value for key, value in self.items() if not isinstance(value, dict | list)}]
        return pandas.json_normalize([dict(row) for row in rows])

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{html.escape(key)}</td><td>{_cell(value)}</td></tr>" for key, value in self._scalars())
        return f"<table>{cells}</table>"

    def _scalars(self) -> list[tuple[str, Any]]:
        shown = [(key, value) for key, value in self.items() if type(value) in (int, float, str)]
        return shown[:SHOWN]


def _cell(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(f"{value:,}" if isinstance(value, int) else value[:120])
