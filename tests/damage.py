"""What can happen to a CSV file: a process is killed, a disk is full, somebody edits it."""

import csv
import io
import random

Rows = list[list[str]]


def damaged(text: str, generator: random.Random) -> str:
    """A file with one or two kinds of damage; header and some rows are mostly left."""
    for _ in range(generator.choice((1, 1, 2))):
        try:
            lines = list(csv.reader(io.StringIO(text)))
        except csv.Error:
            return text
        if len(lines) < 2:
            return text
        text = generator.choice(DAMAGES)(lines[0], lines[1:], generator)
    return text


def written(header: list[str], rows: Rows) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()


def _some_rows(header: list[str], rows: Rows, generator: random.Random) -> str:
    share = generator.random()
    return written(header, [row for row in rows if generator.random() < share])


def _one_row(header: list[str], rows: Rows, generator: random.Random) -> str:
    return written(header, [generator.choice(rows)])


def _no_rows(header: list[str], rows: Rows, generator: random.Random) -> str:
    return written(header, [])


def _column_and_value(rows: Rows, generator: random.Random) -> tuple[int, str]:
    row = generator.choice(rows)
    column = generator.randrange(len(row))
    return column, row[column]


def _rows_without_a_value(header: list[str], rows: Rows, generator: random.Random) -> str:
    """Say, all but those of one method, or of one phase."""
    column, value = _column_and_value(rows, generator)
    return written(header, [row for row in rows if row[column:][:1] != [value]])


def _rows_with_a_value(header: list[str], rows: Rows, generator: random.Random) -> str:
    column, value = _column_and_value(rows, generator)
    return written(header, [row for row in rows if row[column:][:1] == [value]])


def _no_column(header: list[str], rows: Rows, generator: random.Random) -> str:
    column = generator.randrange(len(header))
    header, *rows = [row[:column] + row[column + 1 :] for row in (header, *rows)]
    return written(header, rows)


def _empty_column(header: list[str], rows: Rows, generator: random.Random) -> str:
    column = generator.randrange(len(header))
    return written(header, [[*row[:column], "", *row[column + 1 :]] for row in rows])


def _empty_cells(header: list[str], rows: Rows, generator: random.Random) -> str:
    share = generator.choice((0.003, 0.03, 0.3))
    return written(header, [["" if generator.random() < share else cell for cell in row] for row in rows])


def _other_cell(header: list[str], rows: Rows, generator: random.Random) -> str:
    row = generator.choice(rows)
    row[generator.randrange(len(row))] = generator.choice(("x", "-1", "0", "nan", "inf", "1e400", "True"))
    return written(header, rows)


def _cut(header: list[str], rows: Rows, generator: random.Random) -> str:
    text = written(header, rows)
    return text[: generator.randrange(len(text))]


def _empty(header: list[str], rows: Rows, generator: random.Random) -> str:
    return generator.choice(("", "\n", "\0\n"))


DAMAGES = (
    *(_some_rows, _one_row, _no_rows, _rows_without_a_value, _rows_with_a_value),
    *(_no_column, _empty_column, _empty_cells, _other_cell, _cut, _empty),
)
