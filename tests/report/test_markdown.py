"""The model-card snippet says what the page says, and a name cannot break out of it."""

import copy
import re

import pytest

from tiltmeter.errors import DataError
from tiltmeter.report import render_markdown


def cells(line):
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_the_forecast_its_interval_and_its_limits_are_there(sample):
    text = render_markdown([sample])
    assert "**Wears the model down.**" in text
    assert "| Refusal margin | 2.83 nats | 90 % interval 2.55 to 3.11 | at step 24, last step claimed;" in text
    assert "not a measurement" in text
    assert "| Initial overlap | 0.121 (0.102 to 0.143) nats^1/2 per flow time |" in text


def test_tables_keep_their_shape_whatever_the_names(sample):
    hostile = "a|b\n# c <script>alert(1)</script> `x` [l](javascript:1) \\"
    other = copy.deepcopy(sample)
    other["model"]["name"] = other["tuning"]["name"] = other["verdict"]["text"] = hostile
    other["forecast"], other["reasons"] = None, {"forecast": hostile}
    text = render_markdown([sample, other])
    assert "<" not in text
    assert "\n# c" not in text
    assert "](" not in text.replace("\\](", "")
    widths = None
    for line in text.splitlines():
        if line.startswith("|"):
            assert widths in (None, len(cells(line))), line
            widths = len(cells(line))
        else:
            widths = None


def test_nulls_say_why(sample):
    sample["forecast"] = None
    sample["reasons"]["forecast"] = "the loss is not finite"
    text = render_markdown([sample])
    assert "| Refusal margin | — |  | not measured: the loss is not finite |" in text
    assert not re.search(r"\b(nan|None)\b", text)


def test_several_are_compared_first(sample):
    other = copy.deepcopy(sample)
    other["tuning"]["name"] = "other"
    text = render_markdown([sample, other])
    change = "−1.980 (−2.045 to −1.915) nats; from 4.2 to 2.22 (1.67 to 2.77)"
    assert f"| other | {change}; at step 40; beyond the horizon: not claimed |" in text
    assert text.index("| other |") < text.index("### ")


def test_no_record_is_bad_input():
    with pytest.raises(DataError):
        render_markdown([])
