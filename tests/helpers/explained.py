"""What holds of every explanation that is printed."""

from __future__ import annotations

from fastunet.explanation import Explanation


def narrow_and_whole(found: Explanation) -> None:
    """Assert that it has 100 columns at most, a line of its own for each row that differs, and every reason."""
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    table, notes = lines[1 : lines.index("")], " ".join(" ".join(lines[lines.index("") :]).split())
    assert len(table) == len(found.rows)
    assert len(set(table)) == len(set(found.rows))
    for row in found.rows:
        assert " ".join(row.reason.split()) in notes
        assert not row.replaced_by or f"replaced by {row.replaced_by};" in notes
