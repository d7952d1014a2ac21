"""The page shows what the raw data say, and the data are what a reader would take them for."""

import json
import subprocess
import sys

import pytest
import questions
import tables

DATA = tables.Data()
LENGTHS = {
    "vault": len(questions.forbidden("heldout")),
    "potion": len(questions.forbidden("heldout", "potion")),
    "wrapped": len(questions.wrapped("heldout")),
    "paraphrases": len(questions.paraphrases()),
    "normal": len(questions.normal("heldout")),
    "records": 100,
    "short": len(questions.short_prompts("heldout")),
    "generated": len(questions.forbidden("heldout")),
    "dev-vault": len(questions.forbidden("calibration")),
    "dev-records": 40,
    "general": len(questions.normal("heldout")),
}


def test_page_is_what_the_data_give_byte_for_byte():
    page = tables.PAGE.read_text()
    assert page.count("<!-- table ") >= 6
    assert tables.filled(page, DATA) == page


def test_check_notices_one_changed_figure(tmp_path):
    page = tables.PAGE.read_text()
    copy = tmp_path / "page.md"
    for text, expected in ((page, 0), (page.replace("0.", "1.", 1), None)):
        start = text.index("<!-- table ")
        if expected is None:
            text = page[:start] + page[start:].replace("0.", "1.", 1)
            expected = 1
        copy.write_text(text)
        run = subprocess.run([sys.executable, tables.__file__, "--check", "--page", str(copy)], check=False)
        assert run.returncode == expected


def test_unknown_table_is_refused():
    with pytest.raises(ValueError, match="'nothing'"):
        tables.filled("<!-- table nothing -->\n<!-- end -->", DATA)


def test_every_measurement_is_complete_and_unique():
    keys = [(row.adapter, row.rule, row.setting, row.draw, row.set) for row in DATA.rows]
    assert len(keys) == len(set(keys))
    for row in DATA.rows:
        for field in {"answered", "right", "opens"} & row.result.keys():
            assert set(row.result[field]) <= {"0", "1"}
            assert len(row.result[field]) == LENGTHS[row.set]
        for field in {"comply", "nll"} & row.result.keys():
            assert row.result[field] >= 0


def test_settings_follow_from_the_development_adapter_alone():
    import experiments

    store = experiments.Store(tables.RESULTS / "measurements.jsonl")
    for name, entry in DATA.settings.items():
        assert entry["on"] == experiments.DEVELOPMENT.name
        assert entry["setting"] == experiments.choose(store, name)


def test_rows_of_templates_are_clusters():
    for name, size in tables.TOGETHER.items():
        assert LENGTHS[name] % size == 0


def test_wilson_and_bootstrap():
    low, high = tables.wilson(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert tables.wilson(0, 10)[0] == 0
    assert tables.bootstrap([0.5] * 10) == (0.5, 0.5)
    low, high = tables.bootstrap([0.0, 1.0] * 5)
    assert low < 0.5 < high
    share = tables.Share(("1100", "1000"), template=2)
    assert (share.value, share.total, share.clusters) == (3 / 8, 8, [0.75, 0.0])


def test_results_are_small_and_name_no_path():
    files = list(tables.RESULTS.iterdir())
    assert sum(file.stat().st_size for file in files) < 1_000_000
    for file in files:
        assert "/home" not in file.read_text() and "/work" not in file.read_text()
    json.loads((tables.RESULTS / "settings.json").read_text())


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_made(name):
    lines = tables.TABLES[name](DATA).splitlines()
    assert len({line.count(" | ") for line in lines}) == 1
    assert ("<!-- table " + name in tables.PAGE.read_text()) <= (len(lines) > 2)
