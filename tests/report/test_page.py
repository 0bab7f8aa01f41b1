"""The page as a whole: well formed, self-contained, safe, and drawn only from what is there."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mi_jax.report import write_report
from mi_jax.report.page import SECTIONS, STAGES, render

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input", "col"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style>",
    "{{ 7 * 7 }}",
    "&amp;",
    "' onload='x",
    "\x00\ud800",
]


class Balance(HTMLParser):
    """Collects tags, attributes and text, and fails on a tag that closes another."""

    def __init__(self, document):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.ids, self.text = [], [], [], [], []
        self.feed(document)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def words(document):
    return " ".join("".join(Balance(document).text).split())


def test_full_run_is_one_well_formed_file_below_3_mb(full_data, results, bars, tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write_report(full_data, results, path, bars=bars) is None
    document = path.read_text(encoding="utf-8")
    page = Balance(document)
    assert path.stat().st_size < 3_000_000
    assert len(page.ids) == len(set(page.ids))
    assert set(STAGES) <= set(page.ids)
    assert page.tags.count("h1") == 1
    assert all(limit in words(document) for limit in full_data["limits"])


def test_nothing_is_loaded_from_elsewhere(data, results):
    document = render(data, results)
    page = Balance(document)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [
        a for a in page.attributes if a[1] in ("src", "srcset", "action", "xlink:href", "style") and "//" in a[2]
    ]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert not re.search(r"https?:|url\(|@import|@font-face|\bfetch\(|XMLHttpRequest|\beval\(", document)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(data, results, hostile):
    def poison(tree):
        if isinstance(tree, str):
            return tree + hostile
        if isinstance(tree, list):
            return [poison(leaf) for leaf in tree]
        if isinstance(tree, dict):
            return {key: poison(leaf) for key, leaf in tree.items()}
        return tree

    clean = Balance(render(data, results))
    page = Balance(render(poison(data), {**results, f"run.{hostile}": hostile}))
    assert page.tags.count("script") == clean.tags.count("script") == 1
    assert set(page.tags) == set(clean.tags)
    assert {(tag, name) for tag, name, _ in page.attributes} <= {(tag, name) for tag, name, _ in clean.attributes}
    assert hostile in "".join(page.text) or hostile == "\x00\ud800"


def test_what_no_encoder_takes_is_replaced(tmp_path):
    write_report({"run": {"title": "a\x00b\ud800c"}}, {}, tmp_path / "report.html")
    assert "<h1>a␀b?c</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", list(SECTIONS))
def test_a_missing_section_leaves_no_trace(data, results, missing):
    del data[missing]
    page = Balance(render(data, results))
    assert missing not in page.ids
    assert [i for i in page.ids if i in STAGES] == [s for s in STAGES if s != missing]


def test_nothing_at_all_is_still_a_page():
    page = Balance(render({}, {}))
    assert not {"section", "svg", "figure", "table", "nav"} & set(page.tags)


@pytest.mark.parametrize("section", STAGES)
def test_each_part_of_a_section_can_be_missing(data, section):
    for part in list(data[section]):
        without = {name: value for name, value in data[section].items() if name != part}
        Balance(render({section: without}, {}))
        only = Balance(render({section: {part: data[section][part]}}, {}))
        assert "figcaption" not in only.tags or "svg" in only.tags


STRUCTURE = {"from", "to", "name", "layer", "kind", "decile"}


def test_records_with_missing_fields_and_numbers_are_tolerated(data):
    def thin(tree, skip):
        """Without every field whose name has a length of `skip` modulo 3, and with every third number not a number."""
        if isinstance(tree, dict):
            kept = {k: v for k, v in tree.items() if isinstance(v, list | dict) or k in STRUCTURE or len(k) % 3 != skip}
            return {k: v if k == "log10_edges" else thin(v, skip) for k, v in kept.items()}
        if isinstance(tree, list) and all(isinstance(v, float) for v in tree):
            return [float("nan") if i % 3 == skip else v for i, v in enumerate(tree)]
        return [thin(leaf, skip) for leaf in tree] if isinstance(tree, list) else tree

    for skip in range(3):
        Balance(render(thin(data, skip), {"a.b": float("nan"), "a.b_null": None}))


def test_figures_stand_beside_null_and_interval(data, results, bars):
    text = words(render(data, results, bars=bars))
    assert "IOI accuracy 0.972 [0.951, 0.986] null 0.500 higher is better" in text.replace("]null", "] null").replace(
        "0.500higher", "0.500 higher"
    )
    assert re.search(r"ioi_accuracy\s*0\.972\s*0\.500\s*\[0\.951, 0\.986\]\s*✓ ≥ 0\.95", text)
    assert "✗ ≤ 0.15" in text
    assert "134,515,008" in text


def test_tokens_show_their_spaces_and_newlines(data):
    text = words(render({"raw_model": data["raw_model"]}, {}))
    assert "·Mary" in text
    assert "⏎" in text
    assert "∅" in text


def test_every_decile_of_every_feature_is_reachable(data):
    page = Balance(render({"features": data["features"]}, {}))
    assert [v for _, name, v in page.attributes if name == "data-tab"] == [str(d) for d in range(10, 0, -1)] * 2


def test_every_drawing_has_a_label(data, results):
    document = render(data, results)
    assert document.count("<svg ") == len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]+"', document)) >= 25


def test_arrays_count_as_lists_and_numbers(data):
    sweep = data["circuit"]["sweep"]
    listed = render({"circuit": {"sweep": sweep}}, {"a.b": 0.5})
    sweep["values"] = np.asarray(sweep["values"])
    assert render({"circuit": {"sweep": sweep}}, {"a.b": np.float64(0.5)}) == listed


def test_unknown_section_is_named():
    with pytest.raises(ValueError, match=r"no section \['circuits'\]; its sections are \['run', 'raw_model'"):
        render({"circuits": {"task": "IOI"}}, {})


def test_value_without_json_form_is_named():
    with pytest.raises(TypeError, match="it got a set"):
        render({"run": {"config": {"layers": {1, 2}}}}, {})
