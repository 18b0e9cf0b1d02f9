"""The list of planted faults stays true: each still finds its text, and tests that are there."""

import pytest

from tests.faults.__main__ import ROOT, read

FAULTS = read()


def test_all_are_different():
    assert len({(fault.file, fault.before, fault.after) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.list}: {fault.what}")
def test_it_can_be_planted(fault):
    text = (ROOT / fault.file).read_text()
    assert fault.planted(text) != text
    for test in fault.tests:
        file, *names = test.split("::")  # a test, of a class or not
        assert f"def {names[-1].partition('[')[0]}" in (ROOT / file).read_text() if names else (ROOT / file).is_file()


@pytest.mark.parametrize("page", sorted((ROOT / "tests/faults").glob("*.yaml")), ids=lambda page: page.stem)
def test_a_list_names_each_file_once(page):
    """A second time the YAML reader would forget the first."""
    files = [line for line in page.read_text().splitlines() if line.endswith(":") and line[0] not in " -#"]
    assert len({*files}) == len(files) > 0
