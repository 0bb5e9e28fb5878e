"""README.md has the support table that the tests' marks make."""

from __future__ import annotations

import pytest
import support_table


def test_the_readme_has_the_rows_that_the_tests_bear():
    text = support_table.README.read_text(encoding="utf-8")
    assert text == support_table.written(text), "run python -m tests.support_table"


def test_each_area_has_rows():
    assert {area for area, _ in support_table.rows()} == set(support_table.AREAS)


def test_a_mark_without_a_known_area_is_refused(tmp_path):
    path = tmp_path / "test_new.py"
    path.write_text('@pytest.mark.supports("marketing", "everything")\ndef test_nothing():\n    pass\n')
    with pytest.raises(ValueError, match="test_nothing supports 'marketing'; areas are compile"):
        list(support_table.marks(path))
