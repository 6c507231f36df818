import re

from fastrlhf.report.page import render_page


def test_a_page_holds_its_title_facts_and_sections_with_links_to_them():
    page = render_page("a run", ["seed 1", "cpu"], [("Curves", "<p>one</p>"), ("Samples", "<p>two</p>")])
    assert page.startswith("<!doctype html>\n")
    assert "<title>a run - fastrlhf</title>" in page
    assert "<h1>a run</h1>" in page
    assert "<span>seed 1</span><span>cpu</span>" in page
    assert re.findall(r'<a href="#(\w+)">(\w+)</a>', page) == [("s0", "Curves"), ("s1", "Samples")]
    assert re.findall(r'<section id="(\w+)"><h2>(\w+)</h2>\n<p>(\w+)</p></section>', page) == [
        ("s0", "Curves", "one"),
        ("s1", "Samples", "two"),
    ]


def test_text_is_escaped_and_markup_of_sections_is_not():
    page = render_page("<b>&", ["<i>"], [('"<u>"', "<table></table>")])
    for raw in ("<b>", "<i>", "<u>"):
        assert raw not in page
    for escaped in ("<h1>&lt;b&gt;&amp;</h1>", "<span>&lt;i&gt;</span>", ">&quot;&lt;u&gt;&quot;</h2>"):
        assert escaped in page
    assert "<table></table>" in page


def test_the_page_asks_the_browser_for_nothing():
    page = render_page("a", [], [])
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|//\w|<script|<link|<img|@import|url\(", page)


def test_every_colour_is_defined_for_light_and_dark():
    page = render_page("a", [], [])
    used, (light, dark) = set(re.findall(r"var\((--\w+)\)", page)), re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    for palette in (light, dark):  # --w is not a colour; every token sets it
        assert used - {"--w"} <= set(re.findall(r"(--\w+):", palette))
