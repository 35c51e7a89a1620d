import filecmp
import re
from html.parser import HTMLParser

import pytest

from apiq.errors import ApiqError
from apiq.files import write_json
from apiq.reporting import provenance
from apiq.reporting.gather import Folders, Run
from apiq.reporting.page import report
from apiq.reporting.units import MINUS

FIGURES = [
    "activation_errors",
    "adapters",
    "block_losses",
    "codes",
    "cost",
    "effective_bits",
    "finetuning",
    "loss_curves",
    "pareto",
    "perplexity",
    "weight_errors",
    "weight_gains",
    "weights",
]


class Page(HTMLParser):
    """What a browser would load, and what a reader would read."""

    void = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loads += [tag] if tag in ("script", "link", "img", "iframe", "object") else []
        self.loads += [value for key, value in values.items() if key in ("src", "srcset", "data", "poster")]
        self.links += [values["href"]] if "href" in values else []
        self.ids += [values["id"]] if "id" in values else []
        self.open += [] if tag in self.void else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open if tag in self.void else self.open[:-1]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    assert (
        report(data, out, title="Tiny & <small>", parameters={"calibration": {"windows": 128}}) == out / "report.html"
    )
    return out


@pytest.fixture(scope="module")
def page(whole):
    return Page((whole / "report.html").read_text())


def test_the_page_loads_nothing_and_its_links_lead_to_its_own_parts(page):
    assert page.loads == []
    assert len(set(page.ids)) == len(page.ids)
    assert page.links and {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)


def test_the_page_has_no_address_to_load_from(whole):
    text = (whole / "report.html").read_text()
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(http" not in text


@pytest.mark.parametrize(
    "number",
    [
        "7.389", "20.09", "12.18", "2.000", "8.000", "4.000", "+1.0000", "+0.5000", "+1.3863", "+0.6931", "50 %",
        "0.500 ± 0.021", "0.300 ± 0.019", f"{MINUS}0.200", "2.250", "+1.00", "75 %", "2 min 05 s", "1 h 02 min",
        "900 MiB", "2.00 GiB", "2.750", "2.125", "1 h 04 min", "1.5", "128", "17", "decade", "c0ffee",
    ],
)  # fmt: skip
def test_the_page_has_the_numbers_that_it_was_given(page, number):
    assert number in page.text


def test_the_page_shows_what_was_counted_and_measured_in_the_checkpoint(page, quantized):
    from apiq.files import read_json
    from apiq.reporting.units import number

    metrics = read_json(quantized["apiq-bw"] / "metrics.json")
    values = [metrics["bits"][part] for part in ("codes", "scales", "zeros", "adapters", "total")]
    values += [block[key] for block in metrics["blocks"] for key in ("loss_first", "loss_last")]
    assert all(number(value) in page.text for value in values)


def test_names_are_escaped(whole, page):
    assert "<h1>Tiny &amp; &lt;small&gt;</h1>" in (whole / "report.html").read_text()
    assert page.text.count("Tiny & <small>") == 2


def test_figures_and_tables_stand_beside_the_page(whole):
    assert sorted(path.name for path in (whole / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
    )
    results = (whole / "tables/results.md").read_text()
    assert "| wiki | 7.389 | 20.09 (+1.0000) | 12.18 (+0.5000) | 50 % |" in results
    sums = next(line for line in results.splitlines() if line.startswith("| sums"))
    assert sums.endswith(f"| 0.500 ± 0.021 | 0.300 ± 0.019 ({MINUS}0.200) | 0.400 ± 0.020 ({MINUS}0.100) | 50 % |")


def test_the_same_inputs_give_the_same_bytes(whole, data, tmp_path):
    report(data, tmp_path / "again", title="Tiny & <small>", parameters={"calibration": {"windows": 128}})
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    _, different, missing = filecmp.cmpfiles(whole, tmp_path / "again", files, shallow=False)
    assert (different, missing) == ([], [])


def test_rounding_without_adapters_tasks_and_finetuning_is_told_as_such(data, quantized, tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"full": {"perplexity": {"<i>": 2.0}}, "quantized": {"perplexity": {"<i>": NaN}}}'
    )
    folders = Folders(data / "model", None, quantized["rtn"], tmp_path, tmp_path, None)
    text = Page(report(folders, tmp_path / "report").read_text()).text
    for sentence in (
        "The finetuned model was not evaluated.",
        "No tasks were evaluated.",
        "No errors of blocks were measured",
        "There are no curves by epoch: this method fits nothing.",
        "the checkpoint has no adapters.",
        "There is no log.csv of the finetuning: it has not been run.",
        "There are no records of time and memory.",
        "Not a finite number.",
        "What it lost in perplexity has not been measured.",
    ):
        assert sentence in text
    assert "<i> 2.000 — 1 — 2" in text


def test_an_evaluation_alone_makes_a_page(data, tmp_path):
    text = Page(report(Folders(evaluation=data / "evaluation"), tmp_path / "report").read_text()).text
    assert "20.09" in text
    assert "The model has not been quantized." in text
    assert "The quantization was left out of this report." in text


def test_the_numbers_to_read_first_are_of_each_model_but_rounding(tmp_path):
    values = {"full": 2.0, "rtn": 9.0, "quantized": 4.0, "refined": 3.0, "finetuned": 2.5}
    measured = {model: {"perplexity": {"a": value}} for model, value in values.items()}
    write_json(tmp_path / "evaluation/metrics.json", measured)
    text = report(Folders(evaluation=tmp_path / "evaluation"), tmp_path / "report").read_text()
    assert re.findall(r"<dt>(.*?)</dt>", text)[:4] == ["full precision", "quantized", "refined", "finetuned"]


def test_full_precision_weights_that_are_gone_are_told(quantized, tmp_path):
    (tmp_path / "model").mkdir()
    folders = Folders(model=tmp_path / "model", quantized=quantized["rtn"])
    text = Page(report(folders, tmp_path / "report").read_text()).text
    assert "The full-precision weights are not at hand:" in text
    assert "the quantized weight Q." in text


def test_nothing_at_all_is_refused_and_leaves_the_older_report(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.html").write_text("old")
    with pytest.raises(ApiqError, match=r"there is nothing to report in .*data: run the pipeline first"):
        report(tmp_path / "data", tmp_path / "report")
    assert (tmp_path / "report/report.html").read_text() == "old"


def test_the_parameters_of_refinement_are_its_own():
    quantized = {"parameters": {"epochs": 8}}
    recorded = Run(None, {"quantize": quantized, "refine": {**quantized, "refined": {"epochs": 1}}})
    shown = provenance.parameters(recorded, {})
    assert (shown["quantize"], shown["refine"]) == ({"epochs": "8"}, {"epochs": "1"})
    assert provenance.origins(recorded) == {}
    copied = provenance.parameters(Run(None, {"refine": quantized}), {"refine": {"epochs": 0}})
    assert copied["refine"] == {"epochs": "0"}


def test_a_report_takes_the_place_of_no_checkpoint_and_of_nothing_that_it_reads(data, quantized, tmp_path):
    for out in (data / "quantized", data / "evaluation", data):
        with pytest.raises(ApiqError, match="which is read here; give another folder to write to"):
            report(data, out)
    with pytest.raises(ApiqError, match="an earlier run of this command did not write there"):
        report(Folders(evaluation=data / "evaluation"), quantized["rtn"])
    assert (quantized["rtn"] / "apiq.json").is_file()
