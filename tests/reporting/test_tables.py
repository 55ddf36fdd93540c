"""Tables and report pages."""

import re

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.reporting.detector_table import PAPER_ROWS, DetectorRow, detector_table, reduction_percent
from norton_deploy.reporting.report import Heading, Paragraph, Picture, Report, Table


def test_rows_print_in_table_3s_form_beside_the_papers():
    row = DetectorRow("NORTON", "here", 93.39e9, 22.01e6, 134.85e9, 41.81e6, 25.4, 41.2, 0.32, 0.48)
    dense = DetectorRow("dense", "here", 134.85e9, 41.81e6, 134.85e9, 41.81e6, 9.24, 85.0)
    table = detector_table([dense, row], "", paper="box")
    assert table.rows[0][2:] == ("-", "-", "134.85G (00)", "41.81M (00)", "9.2", "85")
    assert table.rows[1][2:] == table.rows[3][2:] == PAPER_ROWS["box"][1][2:]
    assert [line[1] for line in table.rows] == ["here", "here", "paper, RTX 3060", "paper, RTX 3060"]


def test_reduction():
    assert [reduction_percent(a, 100) for a in (100, 91, 50, 0)] == ["00", "09", "50", "100"]


def test_markdown_and_ragged_rows():
    table = Table(("a", "b|c"), (("1", "2"),), "Caption")
    assert table.to_markdown() == "Caption\n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="2 columns"):
        Table(("a", "b"), (("1",),))


def test_report_pages_hold_everything_and_escape_it(tmp_path):
    import cv2

    picture = tmp_path / "pictures" / "p.png"
    picture.parent.mkdir()
    cv2.imwrite(str(picture), np.zeros((2, 2, 3), np.uint8))
    report = Report(
        "A & B", [Heading("<h>"), Paragraph("x < y"), Picture(picture, "black"), Table(("a",), (("<1>",),))]
    )
    page = report.to_html()
    for part in ("A &amp; B", '<h2 id="h">&lt;h&gt;</h2>', "<p>x &lt; y</p>", "&lt;1&gt;", "data:image/png;base64,"):
        assert part in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    markdown = report.to_markdown(tmp_path)
    assert "# A & B" in markdown and "![black](pictures/p.png)" in markdown
    with pytest.raises(UserError, match=r"absent\.png"):
        Report("r", [Picture(tmp_path / "absent.png", "")]).to_html()
