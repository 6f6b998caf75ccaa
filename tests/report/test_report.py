"""The report: its numbers against independent computations, its page in a real browser, its commands."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from tiny_models import tiny_model, tiny_processor, tiny_samples
from typer.testing import CliRunner

import masquant
from masquant.calibration.dataset import load_samples
from masquant.card import with_loss
from masquant.cli import app
from masquant.compare import compare
from masquant.errors import CheckpointError, DataError
from masquant.evaluation import Evaluation, ModelDescription, SampleScore, comparison_dict, results_of
from masquant.report import comparison_content, embed_examples, evaluation_record, example_ids, render_page, report_run
from masquant.report.charts import _log_ticks, by_kind, group_title

FAMILY = "qwen2_5_omni"


@dataclasses.dataclass(frozen=True)
class World:
    """A compared tiny model: its folders, samples, results, and the methods' records."""

    root: Path
    samples: list[Any]
    results: dict[str, Evaluation]
    records: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.root / "out"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("report")
    tiny_model(FAMILY).save_pretrained(root / "model")
    tiny_processor(FAMILY).save_pretrained(root / "model")
    rows = tiny_samples(FAMILY, root / "data", count=8)
    rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in row.items()} for row in rows]
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, records = load_samples(root / "data"), {}

    def keep(method: str, model: Any, processor: Any, report: Any, _: Evaluation) -> None:
        records[method] = report.to_dict()
        if method == "masquant-paper":
            masquant.save(model, processor, root / "out", report)

    methods = ["rtn", "masquant-paper"]
    results = compare(root / "model", methods, samples, samples, group_size=32, keep=keep)
    return World(root, samples, results, records)


def test_losses_per_modality(world: World) -> None:
    """Sums over answer tokens, by hand: the change of the pooled tasks, and the difference between methods."""
    record = evaluation_record(world.results, world.samples)
    assert [e["modality"] for e in record["modalities"]] == ["text", "vision", "audio", "vision + audio"]
    kinds = {s.id: (s.image is not None, s.audio is not None) for s in world.samples}
    for entry, wanted in zip(
        record["modalities"], [(False, False), (True, False), (False, True), (True, True)], strict=True
    ):
        scores = {name: [s for s in r.samples if kinds[s.id] == wanted] for name, r in world.results.items()}
        tokens = sum(s.tokens for s in scores["rtn"])
        total = {name: sum(s.nll for s in found) for name, found in scores.items()}
        for name in ("rtn", "masquant-paper"):
            change = (total[name] - total["float"]) / tokens
            assert entry["models"][name]["delta_nll"] == pytest.approx(change, abs=1e-9)
        assert entry["num_samples"] == len(scores["rtn"])
        difference = (total["masquant-paper"] - total["rtn"]) / tokens
        assert entry["against"]["rtn"]["difference"] == pytest.approx(difference, abs=1e-9)
        assert set(entry["against"]) == {"rtn"}


def test_results_survive_json(world: World) -> None:
    written = json.loads(json.dumps(comparison_dict(world.results, samples=True)))
    assert evaluation_record(results_of(written), world.samples) == evaluation_record(world.results, world.samples)
    with pytest.raises(DataError, match="without its samples|with its samples"):
        results_of(comparison_dict(world.results))


def score(i: str, prediction: str, reference: str = "red") -> SampleScore:
    return SampleScore(i, "t", False, 1.0, 1, prediction=prediction, reference=reference)


def test_examples_show_where_answers_differ() -> None:
    answers = {"a": ("red", "red"), "b": ("red", "blue"), "c": ("green", "blue"), "d": ("Red", "pink")}
    results = {
        name: Evaluation(ModelDescription(), tuple(score(i, pair[column]) for i, pair in answers.items()))
        for column, name in enumerate(("float", "other"))
    }
    assert example_ids(results) == ["b"]
    assert example_ids(results, per_task=4) == ["b", "d", "a", "c"]
    assert example_ids(results, tasks=("speech",)) == []


def test_a_result_of_other_samples_is_refused(world: World) -> None:
    with pytest.raises(DataError, match="that the data lacks"):
        evaluation_record(world.results, world.samples[:1])


@pytest.mark.parametrize("domain", [(0.02, 40.0), (1e-6, 0.3), (3.0, 5.0), (1e-7, 1e5)])
def test_logarithmic_ticks(domain: tuple[float, float]) -> None:
    ticks = _log_ticks(domain)
    assert all(domain[0] <= tick <= domain[1] for tick in ticks) and len(ticks) <= 8
    assert all(re.fullmatch(r"[125]e[+-]\d\d", f"{tick:.0e}") for tick in ticks)


def test_experts_are_drawn_as_one(world: World) -> None:
    blocks = world.records["rtn"]["blocks"]
    assert by_kind(blocks) == blocks
    one, other = (blocks[i]["groups"][3] for i in (0, 1))
    names = [{**one, "group": "experts.0.down"}, {**other, "group": "experts.11.down"}]
    (merged,) = by_kind([{"block": 0, "groups": names}])[0]["groups"]
    assert merged["group"] == "experts.down" and group_title(merged["group"]) == "input of down of experts"
    for name in ("text", "audio"):
        pair = [g["ranges"]["before"]["channels"][name] for g in (one, other)]
        found = merged["ranges"]["before"]["channels"][name]
        assert found["max"] == max(p["max"] for p in pair) and found["min"] == min(p["min"] for p in pair)
        assert found["median"] == pytest.approx(sum(p["median"] for p in pair) / 2)
        assert merged["errors"][name] == pytest.approx((one["errors"][name] + other["errors"][name]) / 2)


def spec_numbers(page: str) -> set[str]:
    """Numbers of the data that the page's pictures draw."""
    text = page.split('<script type="application/json" id="charts">')[1].split("</script>")[0]
    shown = ("min", "q25", "median", "q75", "max", "db", "error", "change")
    rows = [
        row
        for spec in json.loads(text)
        for layer in [spec, *spec["layer"]]
        for row in layer.get("data", {}).get("values", [])
    ]
    return {repr(value) for row in rows for key, value in row.items() if key in shown and isinstance(value, float)}


def test_json_holds_what_the_page_draws(world: World) -> None:
    content = comparison_content(world.records, world.results, world.samples)
    numbers = {repr(v) for v in _floats(json.loads(json.dumps(content)))}
    drawn = spec_numbers(render_page(content))
    assert len(drawn) > 100 and drawn <= numbers


def _floats(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _floats(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _floats(inner)]
    return [value] if isinstance(value, float) else []


def test_what_models_say_stays_text(world: World) -> None:
    content = comparison_content(world.records, world.results, world.samples)
    content["evaluation"]["examples"][0]["answers"]["rtn"] = "</script><script>alert(1)</script><b>"
    content["title"] = "a</script><i>"
    page = render_page(content)
    assert "<script>alert" not in page and "<i>" not in page and "&lt;b&gt;" in page


def test_page_in_a_browser(world: World) -> None:
    """From file://: nothing is said on the console or asked of a network, every chart is drawn, media play, it fits a
    phone, and dark is dark."""
    content = comparison_content(world.records, world.results, world.samples)
    target = world.root / "page.html"
    masquant.report.write_report(target, content, embed_examples(content, world.samples))
    assert json.loads(target.with_suffix(".json").read_text()) == json.loads(json.dumps(content))
    colours = {}
    with chromium() as browser:
        for width, scheme in ((1400, "light"), (400, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            asked: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(target.as_uri())
            page.wait_for_function("document.body.dataset.drawn", timeout=60_000)
            assert not said
            assert all(url.startswith(("file:", "data:")) for url in asked)
            charts = page.evaluate(
                """[...document.querySelectorAll(".chart")].map(chart =>
                    [...chart.querySelectorAll(".role-mark path, .role-mark line, .role-mark text")].filter(mark => {
                        const box = mark.getBoundingClientRect();
                        return box.width + box.height > 0;
                    }).length)"""
            )
            assert len(charts) >= 20 and all(count > 0 for count in charts)
            wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1]
            sound = page.locator("audio").first
            assert sound.count() == 1
            page.wait_for_function("document.querySelector('audio').duration > 0.1", timeout=20_000)
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.locator(".example img").count() > 0 and page.locator("table").count() >= 3
            colours[scheme] = page.evaluate(
                "[getComputedStyle(document.body).backgroundColor, "
                "getComputedStyle(document.querySelector('.chart path[stroke^=var]')).stroke]"
            )
            page.close()
    assert colours["light"][0] != colours["dark"][0] and colours["light"][1] != colours["dark"][1]


def test_report_of_a_run(world: World) -> None:
    """Without an evaluation, then with a result file; the folder's JSON and model card take it in."""
    runner = CliRunner()
    assert not runner.invoke(app, ["report", str(world.out)]).exception
    page = (world.out / "report.html").read_text()
    assert "Not measured yet" in page and "Worst sites" in page
    card = (world.out / "README.md").read_text()
    assert "Not measured yet." in card and "base_model: model" in card and "| audio |" in card
    assert "`visual`" in card and "import masquant" in card
    file = world.root / "result.json"
    file.write_text(json.dumps(world.results["masquant-paper"].to_dict(samples=True)))
    done = runner.invoke(app, ["report", str(world.out), "--result", str(file), "--data", str(world.root / "data")])
    assert not done.exception and done.stdout.strip() == str(world.out / "report.html")
    page = (world.out / "report.html").read_text()
    assert "Not measured yet" not in page and "data:audio/flac" in page and "data:image/jpeg" in page
    record = json.loads((world.out / "report.json").read_text())
    change = record["evaluation"]["modalities"][0]["models"]["masquant-paper"]["delta_nll"]
    card = (world.out / "README.md").read_text()
    assert f"{change:+.3f}" in card and "Not measured yet." not in card and card.count("<!-- loss -->") == 1
    elsewhere = world.root / "again.html"
    report_run(world.out, output=elsewhere)
    assert "Loss per modality" in elsewhere.read_text() and elsewhere.with_suffix(".json").exists()
    assert masquant.check(world.out)["scheme"] == "W4A8"


def test_a_card_keeps_what_people_wrote(world: World) -> None:
    card = "# Mine\n<!-- loss -->\nold\n<!-- end of loss -->\nends\n"
    record = evaluation_record(world.results, world.samples)
    filled = with_loss(card, "masquant-paper", record)
    assert filled.startswith("# Mine\n") and filled.endswith("ends\n") and "old" not in filled
    assert with_loss("no marks", "rtn", record) == "no marks"
    assert with_loss(filled, "rtn", None).count("Not measured") == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["report", "{root}/model"], CheckpointError, "report.json cannot be read"),
        (["report", "{root}/out", "--result", "{root}/data/metadata.jsonl"], DataError, "needs --data"),
        (["report", "{root}/out", "-o", "{root}/page.pdf"], DataError, "must end in .html"),
        (["report", "{root}/out", "-o", "{root}/none/page.html"], DataError, "does not exist"),
        (["report", "{root}/out", "--result", "{root}/data/metadata.jsonl", "--data", "{root}/data"],
         DataError, "cannot be read"),
        (["inspect", "{root}/model", "--report", "{root}/r.html"], DataError, "give --calibration"),
        (["inspect", "{root}/model", "--calibration", "{root}/data", "--report", "{root}/r.txt"], DataError, ".html"),
        (["compare", "{root}/model", "--calibration", "{root}/data", "--data", "{root}/data", "--report", "x"],
         DataError, ".html"),
    ],
)  # fmt: skip
def test_mistakes(world: World, arguments: list[str], kind: type[Exception], message: str) -> None:
    done = CliRunner().invoke(app, [a.format(root=world.root) for a in arguments])
    assert isinstance(done.exception, kind) and message in str(done.exception)


def test_a_report_of_an_older_version_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"method": "rtn", "blocks": [{"groups": [{"group": "qkv"}]}]}))
    with pytest.raises(DataError, match="older version"):
        report_run(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_inspect_draws_the_float_model(world: World) -> None:
    target = world.root / "ranges.html"
    done = CliRunner().invoke(
        app,
        ["inspect", str(world.root / "model"), "--calibration", str(world.root / "data"), "--json", "-", "-q",
         "--report", str(target)],
    )  # fmt: skip
    assert not done.exception
    rows = json.loads(done.stdout)["ranges"]
    found = json.loads(target.with_suffix(".json").read_text())
    assert found["ranges"] == rows and found["title"] == "model"
    page = target.read_text()
    assert "Worst sites" not in page and page.count('class="chart"') == 8
    # block 0 meets the same inputs whatever comes after it, so the quantized run saw the same ranges
    before = world.records["rtn"]["blocks"][0]["groups"][0]["ranges"]["before"]["channels"]
    for name, channels in rows[0]["channels"].items():
        assert math.isclose(channels["max"], before[name]["max"], rel_tol=1e-3)
