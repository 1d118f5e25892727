"""Images in a column of a parquet file, by row, with a bounded part of the file in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dgs.data.images import UnreadableImage
from dgs.errors import UserError

KEPT = 256_000_000  # bytes of row groups that stay in memory
LARGE = 64_000_000  # bytes of a row group, above which it is read forwards in pieces
PIECE = 32  # rows


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def open_parquet(path: Path) -> Any:
    """A parquet file, opened to be streamed.

    Raises:
        UserError: it is none, or is damaged.
    """
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Expected a parquet file at {path}, found none that opens ({reason}). Replace it.") from None


def image_column(schema: Any, path: Path) -> str:
    """The column of encoded images: of bytes, or of structs {bytes, path}, as data sets are published.

    Raises:
        UserError: there is none, or there are several and none is called image.
    """
    found = []
    for field in schema:
        if _is_bytes(field.type):
            found.append(field.name)
        elif pa.types.is_struct(field.type) and any(f.name == "bytes" and _is_bytes(f.type) for f in field.type):
            found.append(f"{field.name}.bytes")
    named = [name for name in found if name.partition(".")[0] == "image"] or found
    if len(named) != 1:
        what = ", ".join(named) or f"{', '.join(schema.names)}, none of them of bytes"
        raise UserError(
            f"Expected one column of images (bytes, or {{bytes, path}}) in {path}, found {what}. Call it image."
        )
    return named[0]


class Pack:
    """The images of one parquet file."""

    def __init__(self, path: Path) -> None:
        self._file, self.path = open_parquet(path), path
        self._column, about = image_column(self._file.schema_arrow, path), self._file.metadata
        self._starts, self._sizes = [0], []
        for number in range(about.num_row_groups):
            group = about.row_group(number)
            columns = (group.column(index) for index in range(group.num_columns))
            self._sizes.append(sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self._column))
            self._starts.append(self._starts[-1] + group.num_rows)
        self._groups: OrderedDict[int, Any] = OrderedDict()  # small ones that were read last
        self._large, self._first, self._piece = -1, 0, None  # a large one, and the rows of it at hand
        self._pieces: Iterator[Any] = iter(())
        self._lock = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, row: int) -> bytes:
        """The bytes of one image.

        Raises:
            UnreadableImage: the row has none, or the file is damaged there.
        """
        group = bisect_right(self._starts, row) - 1
        within = row - self._starts[group]
        with self._lock:
            try:
                images, start = self._at(group, within)
            except (OSError, pa.ArrowException) as error:
                raise UnreadableImage(f"Cannot read {self.path}, row {row}: {error}. Replace the file.") from None
        data = images[within - start].as_py()
        if data is None:
            raise UnreadableImage(
                f"Expected the bytes of an image in {self.path}, row {row}, found none. Save the data set with its "
                f"images embedded, or as files with data.layout: imagefolder."
            )
        return bytes(data)

    def _at(self, group: int, within: int) -> tuple[Any, int]:
        """Images of a row group with the row `within` among them, and the row that they begin at."""
        if self._sizes[group] <= LARGE:
            if group not in self._groups:
                self._groups[group] = self._values(self._file.read_row_group(group, columns=[self._column]))
            self._groups.move_to_end(group)
            while len(self._groups) > 1 and sum(self._sizes[number] for number in self._groups) > KEPT:
                self._groups.popitem(last=False)
            return self._groups[group], 0
        if self._large != group or within < self._first:
            self._large, self._first, self._piece = group, 0, None
            self._pieces = self._file.iter_batches(PIECE, row_groups=[group], columns=[self._column])
        while self._piece is None or within >= self._first + len(self._piece):
            self._first += 0 if self._piece is None else len(self._piece)
            self._piece = self._values(next(self._pieces))
        return self._piece, self._first

    def _values(self, table: Any) -> Any:
        column = table.column(0)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return column.field("bytes") if self._column.endswith(".bytes") else column
