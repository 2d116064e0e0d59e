"""The report of a round as text, HTML and JSON."""

import json

import pytest
from feedback_browser import needs_browser
from feedback_rounds import judge_all

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response, assess
from dpo_keras.feedback.quality_report import _plot, html, sections, text, write
from dpo_keras.utils.intervals import Estimate


def test_the_report_shows_hostile_names_as_text(make_store, tmp_path):
    name = "<script>alert(1)</script>\u202e$x$"
    given = [
        Candidates(f"p{n}", (Response(f"a{n}", name), Response(f"b{n}", "other"))) for n in range(6)
    ]
    store = make_store(given=given, overlap=1)
    person, _ = store.add_annotator(name)
    judge_all(store, person.id, lambda shown: "left" if hash(shown.left) % 2 else "tie")
    quality = assess(store, resamples=20)
    page = html(quality)
    assert "<script>" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "\u202e" not in text(quality)
    for suffix in (".html", ".json", ".txt"):
        write(quality, tmp_path / f"report{suffix}")
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["judgements"] == 6
    with pytest.raises(InputError, match="must end in"):
        write(quality, tmp_path / "report.pdf")


def test_p_values_that_the_note_speaks_of_are_in_the_table_and_no_column_is_blank(make_store):
    store = make_store(8, overlap=1)
    person, _ = store.add_annotator("ann")
    judge_all(store, person.id, lambda shown: "left")
    people = next(s for s in sections(assess(store, resamples=5)) if s.key == "people")
    row = dict(zip(people.columns, people.rows[0], strict=True))
    assert row["left"] == "100% (p = 0.0078)" and "p tests left" in people.note
    assert not {"group", "checks", "repeats", "agreement"} & set(people.columns)


def test_the_axis_of_agreement_goes_from_0_to_1():
    from matplotlib.figure import Figure

    for low, expected in ((0.8, 0.0), (-0.3, -0.3)):
        figure = Figure()
        _plot({"a": Estimate(0.9, low, 0.95)}, "agreement", limit=1.0).draw(figure)
        assert figure.axes[0].get_xlim() == pytest.approx((expected, 1.0), abs=0.03)


@needs_browser
def test_the_report_follows_light_and_dark_and_is_legible_on_a_phone(driver, make_store, tmp_path):
    store = make_store(8)
    for name, choice in (("ann", "left"), ("bob with a name that is long", "tie")):
        person, _ = store.add_annotator(name)
        judge_all(store, person.id, lambda shown, choice=choice: choice)
    write(assess(store, resamples=20), tmp_path / "report.html")
    phone = {"width": 390, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    ground, grounds = "getComputedStyle(document.body).backgroundColor", []
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        driver.get((tmp_path / "report.html").as_uri())
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            grounds.append(driver.execute_script(f"return {ground}"))
        assert grounds == ["rgb(255, 255, 255)", "rgb(20, 24, 28)"]
        wide, cells, names, plots = driver.execute_script(
            "return [document.documentElement.scrollWidth > innerWidth,"
            " Math.max(...[...document.querySelectorAll('td')].map((c) => c.offsetLeft)),"
            " getComputedStyle(document.querySelector('td[data-name]'), '::before').content,"
            " [...document.images].map((i) => i.naturalWidth && i.offsetWidth / i.naturalWidth)]"
        )
        assert not wide and cells < 40 and "value" in names
        # Letters of 8 points are at least 10 pixels high.
        assert len(plots) >= 2 and min(plots) * 8 * 4 / 3 >= 10
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get("about:blank")


def test_an_empty_store_has_a_report(make_store):
    quality = assess(make_store(2), resamples=5)
    assert quality.counts["judgements"] == 0 and "0 judgements" in text(quality)
    assert html(quality)
