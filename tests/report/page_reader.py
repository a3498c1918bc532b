"""Read a rendered page back with the standard library's parser, independently of how it was written."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
NUMBER = re.compile(r"(?<![\w.^/])(−?\d[\d,]*(?:\.\d+)?)(×10)?([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]*)")
POWER_FOR_ALL = re.compile(r" ×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)")


class Page(HTMLParser):
    """All tags with attributes, the tables as rows of cell texts, and the text outside style sheets."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.tables, self.texts, self.open = [], [], [], []
        self.feed(source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def rows(self):
        return [[" ".join(cell.split()) for cell in row] for table in self.tables for row in table]


def numbers_in(text):
    """Every number of a text as (value, half a unit of its last digit)."""
    common = POWER_FOR_ALL.search(text)
    common = int(common[1].translate(SUPERSCRIPTS)) if common else 0
    found = []
    for digits, times, power in NUMBER.findall(POWER_FOR_ALL.sub("", text)):
        exponent = int(power.translate(SUPERSCRIPTS)) if power else common
        if power and not times:  # 10⁻⁸
            found.append((10.0**exponent, 0.0))
            continue
        digits = digits.replace("−", "-").replace(",", "")
        half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
        found.append((float(digits) * 10.0**exponent, half * 10.0**exponent))
    return found


def shows(text, value):
    """Whether a text holds a number as far as the digits it is written with go."""
    return any(abs(number - value) <= half * 1.0001 + 1e-12 * abs(value) for number, half in numbers_in(text))
