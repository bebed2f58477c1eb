"""Results of evaluations: entries of a JSON file as a dictionary, with a data frame, a page, and a form for notebooks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sae.extras import needs
from ..sae.files import read_text
from .pages.examples import records_of
from .pages.notebook import cell_html, latents_html

if TYPE_CHECKING:
    import pandas


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
        """Return a table: a row for each latent, circuit, node or run where there are several, else one of the scalar entries.

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
        return cell_html(self)


class LatentRecords(list[dict[str, Any]]):
    """Records of latents, as lines of ``features.jsonl``; a notebook shows their figures and strongest contexts."""

    def __repr__(self) -> str:
        return f"LatentRecords(latents {', '.join(str(record['latent']) for record in self)})"

    def _repr_html_(self) -> str:
        return latents_html(self)


class Features(Report):
    """Content of ``features.json``, with the records of single latents behind it.

    >>> features = Features({"n_latents": 3}, [{"latent": latent, "density": 0.1} for latent in range(3)])
    >>> features.records_of([2, 0])
    LatentRecords(latents 2, 0)
    """

    def records_of(self, latents: int | Sequence[int]) -> LatentRecords:
        """Return the records of latents, in the order asked for: contexts, neighbours, logit effects and scores.

        Raises:
            ValueError: If there is no such latent.
        """
        wanted = [int(latent) for latent in np.atleast_1d(np.asarray(latents, dtype=np.int64))]
        if isinstance(self._rows, Path):
            found = records_of(self._rows, set(wanted))
        else:
            found = {row["latent"]: dict(row) for row in self._rows or () if row["latent"] in wanted}
        missing = [latent for latent in wanted if latent not in found]
        if missing:
            raise ValueError(f"latents: expected 0 to {self['n_latents'] - 1}, got {', '.join(map(str, missing))}.")
        return LatentRecords(found[latent] for latent in wanted)
