"""Tests that citations are complete and unique, and that every paper that a method names has a citation."""

import re

from fastrlhf.publish import methods
from fastrlhf.publish.papers import PAPERS, Paper


def test_every_paper_is_on_arxiv_or_has_an_address_and_no_two_are_the_same():
    for key, paper in PAPERS.items():
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) or paper.url.startswith("https://"), key
        assert 2000 + int(paper.arxiv[:2] or paper.year % 100) in (paper.year, paper.year - 1), key
        assert str(paper.year) in key
    places = [paper.arxiv or paper.url for paper in PAPERS.values()]
    assert len({*places}) == len(places)


def test_entries_and_links_have_the_form_of_bibtex_and_markdown():
    lang = PAPERS["lang2024rlp"]
    assert lang.link == "[Lang et al. 2024](https://arxiv.org/abs/2403.19279)"
    assert lang.bibtex("lang2024rlp") == (
        "@misc{lang2024rlp,\n"
        "  title = {{Fine-Tuning Language Models with Reward Learning on Policy}},\n"
        "  author = {Lang, Hao and Huang, Fei and Li, Yongbin},\n"
        "  year = {2024},\n"
        "  eprint = {2403.19279},\n"
        "  archivePrefix = {arXiv}\n"
        "}"
    )
    note = Paper("Mitchell, Eric", 2023, "A Note", url="https://example.org/note.pdf")
    assert note.link == "[Mitchell 2023](https://example.org/note.pdf)"
    assert "url = {https://example.org/note.pdf}" in note.bibtex("x")
    assert "eprint" not in note.bibtex("x")


def test_methods_cite_papers_that_exist_and_every_paper_is_cited():
    tables = [value for value in vars(methods).values() if isinstance(value, dict)]
    known = [x for table in tables for x in table.values() if isinstance(x, methods.Method)]
    known += [value for value in vars(methods).values() if isinstance(value, methods.Method)]
    smoothing = "mitchell2023cdpo"  # added to a method that smooths labels
    cited = {key for method in known for key in method.papers} | {smoothing}
    assert cited == {*PAPERS}
