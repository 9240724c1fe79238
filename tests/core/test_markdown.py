"""Names that try to be more than text stay text."""

from markdown_it import MarkdownIt

from darht.core.markdown import code, escape

HOSTILE = "a|b\n| c | [x](http://evil) <img src=x onerror=y> `d` *e* \\| &lt; # **"


def test_a_name_is_text_and_nothing_else():
    html = (
        MarkdownIt("commonmark").enable("table").render(f"# {escape(HOSTILE)}\n\n|x|y|\n|-|-|\n|{escape(HOSTILE)}|1|\n")
    )
    assert html.count("<td>") == 2 and html.count("<tr>") == 2
    assert not any(tag in html for tag in ("<a", "<img", "<code", "<em", "<strong"))
    assert "[x](http://evil) &lt;img src=x onerror=y&gt; `d` *e* " in html and "&amp;lt;" in html


def test_code_cannot_be_left():
    html = MarkdownIt("commonmark").render(code("a`b | <b>\nc"))
    assert html == "<p><code>ab &lt;b&gt; c</code></p>\n"


def test_plain_names_stay_as_they_are():
    for name in ("wrn-34-10", "preact_resnet18", "timm:vit_tiny", "pgd-20", "L-inf 8/255, 20 steps"):
        assert escape(name) == name
