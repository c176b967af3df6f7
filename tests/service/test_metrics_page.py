"""docs/metrics.md and the code say the same."""

from __future__ import annotations

import re

from deploy.metrics_page import PAGE, page
from service.metrics import SECTIONS, vocabulary


def test_the_page_has_the_tables_that_the_code_has() -> None:
    text = PAGE.read_text()
    assert text == page(text), "run: python deploy/metrics_page.py"


def test_every_name_in_its_text_is_one_of_the_vocabulary() -> None:
    names = {one.full_name for section in SECTIONS for one in vocabulary(section)}
    for found in re.findall(r"vitrine_[a-z_]+", PAGE.read_text()):
        if found == "vitrine_":
            continue
        plain = re.sub(r"_(bucket|sum|count)$", "", found)
        assert found in names or plain in names, found
